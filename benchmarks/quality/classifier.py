"""Quality of generated garments in the eyes of a classifier trained on real ones.

python benchmarks/quality/classifier.py --data /usr/share/datasets/fashion-mnist --out benchmarks/results/quality

For each level alone, by DDPM, and for both solvers at several budgets: the share of samples that the classifier gives
the class they were asked for, and the Fréchet distance of its features to those of the real test images. At the end the
accuracy on real test images of a classifier trained on images of the default solver only. Writes OUT.json, and OUT.png
with a row of images for each row of the table, two of each class.
"""

import io
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor, nn

from mlem_dist.ladder.images import load_images
from mlem_dist.ladder.ladder import Ladder
from mlem_dist.solver.plan import plan_to_dict, single_level

SCRIPT = str(Path(sys.executable).with_name("mlem-dist"))
FEATURES = 64


class Classifier(nn.Module):
    """Three convolutions and a layer of features; images uint8 (n, 1, 32, 32)."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inner, outer in ((1, 16), (16, 32), (32, 64)):
            layers += [nn.Conv2d(inner, outer, 3, padding=1), nn.BatchNorm2d(outer), nn.ReLU(), nn.MaxPool2d(2)]
        self.features = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 16, FEATURES), nn.ReLU())
        self.head = nn.Linear(FEATURES, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images.float() / 127.5 - 1))


def train(images: Tensor, label: Tensor, steps: int) -> Classifier:
    torch.manual_seed(0)
    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        rows = torch.randint(len(images), (128,))
        loss = nn.functional.cross_entropy(model(images[rows]), label[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.inference_mode()
def seen(model: Classifier, images: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Features float64 (n, 64) and predicted classes (n,)."""
    features = torch.cat([model.features(part.float() / 127.5 - 1) for part in images.split(500)])
    return features.double().numpy(), model.head(features).argmax(1).numpy()


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)) of features (n, d); Heusel et al., arXiv:1706.08500."""
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    value, vector = np.linalg.eigh(cov_a)
    root = vector * np.sqrt(value.clip(0)) @ vector.T
    mixed = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * mixed)


def generate(num: int, options: list[str]) -> tuple[Tensor, Tensor, float]:
    """Images, their classes, and the images per second of `mlem-dist generate`."""
    with tempfile.TemporaryDirectory() as folder:
        command = [SCRIPT, "generate", "--num", str(num), "--out", f"{folder}/out", "--engine", "inline", "--json"]
        report = json.loads(subprocess.run([*command, *options], check=True, stdout=subprocess.PIPE).stdout)
        table = pq.read_table(f"{folder}/out/data")
    pictures = [np.array(Image.open(io.BytesIO(image["bytes"]))) for image in table["image"].to_pylist()]
    label = torch.tensor(table["label"].to_numpy())
    return torch.from_numpy(np.stack(pictures))[:, None], label, report["images_per_second"]


@click.command()
@click.option("--data", type=click.Path(path_type=Path), required=True)
@click.option("--ladder", "name", default="fashion")
@click.option("--num", default=2000, help="Samples per row.")
@click.option("--steps", default=100, help="Of each level alone; budgets take the default.")
@click.option("--nfe", default="5,10,20")
@click.option("--train-num", default=60000, help="Generated samples to train a classifier on.")
@click.option("--train-nfe", default=10.0)
@click.option("--classifier-steps", default=2000)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(
    data: Path,
    name: str,
    num: int,
    steps: int,
    nfe: str,
    train_num: int,
    train_nfe: float,
    classifier_steps: int,
    out: Path,
) -> None:
    ladder = Ladder.load(name)
    real = load_images(data, ladder.sample_shape, ladder.labels)
    judge = train(real.train, real.train_label, classifier_steps)
    test, found = seen(judge, real.test)
    rows: list[dict[str, Any]] = []

    sheet: list[np.ndarray] = []

    def row(what: str, images: Tensor, label: Tensor, rate: float | None) -> None:
        features, classes = seen(judge, images)
        two = [images[label == c][:2, 0] for c in range(len(ladder.labels))]
        sheet.append(torch.cat(two).permute(1, 0, 2).flatten(1).numpy())
        accuracy = float((classes == label.numpy()).mean())
        rows.append({"samples": what, "accuracy": accuracy, "frechet": frechet(features, test), "images_per_s": rate})
        print(rows[-1], flush=True)

    row(f"real, {num} of the training images", real.train[:num], real.train_label[:num], None)
    common = ["--ladder", name]
    for number, level in enumerate(ladder.levels, 1):
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            plan = single_level(number, len(ladder.levels), steps)
            json.dump(plan_to_dict(plan, ladder.digest, "sde"), file)
            file.flush()
            row(
                f"{level.name} alone",
                *generate(num, [*common, "--solver", "sde", "--steps", str(steps), "--plan", file.name]),
            )
    for solver in ("ode", "sde"):
        for budget in nfe.split(","):
            row(f"--solver {solver} --nfe {budget}", *generate(num, [*common, "--solver", solver, "--nfe", budget]))
    start = time.monotonic()
    images, label, rate = generate(train_num, [*common, "--nfe", str(train_nfe), "--seed", "1"])
    pupil = train(images, label, classifier_steps)
    result = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} cores",
        "steps": steps,
        "num": num,
        "classifier_accuracy": float((found == real.test_label.numpy()).mean()),
        "rows": rows,
        "trained_on_generated": {
            "num": train_num,
            "nfe": train_nfe,
            "images_per_s": rate,
            "seconds": time.monotonic() - start,
            "accuracy_on_real_test": float((seen(pupil, real.test)[1] == real.test_label.numpy()).mean()),
        },
    }
    out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    Image.fromarray(np.concatenate(sheet)).save(out.with_suffix(".png"))
    print({key: value for key, value in result.items() if key != "rows"})


if __name__ == "__main__":
    main()
