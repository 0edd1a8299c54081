"""Generate a dataset on Ray, and count its classes with Ray Data."""

import sys
from collections import Counter

import mlem_dist

if __name__ == "__main__":
    out = sys.argv[1] if len(sys.argv) > 1 else "out/example"
    report = mlem_dist.generate("fashion", num=60, out=out, nfe=2, block_size=20, shard_size=20)
    print(f"{report.made} images, {report.images_per_second:.0f}/s")
    labels = mlem_dist.read(out).select_columns(["label"])
    for label, count in sorted(Counter(row["label"] for row in labels.iter_rows()).items()):
        print(label, count)
