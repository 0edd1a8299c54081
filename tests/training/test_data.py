import gzip
import io
import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from mlem_dist.errors import UsageError
from mlem_dist.training.data import load_images

RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)
NAMES = ["left", "right"]


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(path, images, labels, names=NAMES):
    """The layout of Hugging Face's image datasets."""
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    table = pa.table(
        {"image": [{"bytes": png(image[0]), "path": None} for image in images], "label": labels.tolist()}
    ).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


def write_pictures(folder, images, labels):
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = folder / NAMES[label] / f"{i:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(image[0]))


def same(a, b):
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("train", "train_label", "test"))


def test_idx_parquet_and_pictures_are_the_same_images(tmp_path, data):
    idx = load_images(data, (1, 8, 8), NAMES)
    assert idx.train.shape == (400, 1, 8, 8)
    write_parquet(tmp_path / "hub/data/train-00000-of-00001.parquet", idx.train, idx.train_label)
    write_parquet(tmp_path / "hub/data/test-00000-of-00001.parquet", idx.test, idx.test_label)
    hub = load_images(tmp_path / "hub", (1, 8, 8), None)
    assert hub.labels == tuple(NAMES)
    assert same(hub, idx)
    # By class, as folders are read.
    order, held = idx.train_label.argsort(stable=True), idx.test_label.argsort(stable=True)
    write_pictures(tmp_path / "pictures/train", idx.train, idx.train_label)
    write_pictures(tmp_path / "pictures/test", idx.test, idx.test_label)
    pictures = load_images(tmp_path / "pictures", (1, 8, 8), None)
    assert pictures.labels == tuple(NAMES)
    assert torch.equal(pictures.train, idx.train[order])
    assert torch.equal(pictures.train_label, idx.train_label[order])
    assert torch.equal(pictures.test, idx.test[held])


def test_a_tenth_is_held_out_where_nothing_is(tmp_path, data):
    idx = load_images(data, (1, 8, 8), NAMES)
    write_pictures(tmp_path / "pictures", idx.train, idx.train_label)
    first, second = (load_images(tmp_path / "pictures", (1, 8, 8), None) for _ in range(2))
    assert len(first.test) == 40
    assert len(first.train) == 360
    assert same(first, second)
    pixels = sorted(image.numpy().tobytes() for image in torch.cat([first.train, first.test]))
    assert pixels == sorted(image.numpy().tobytes() for image in idx.train)


def test_classes_are_numbered_as_the_configuration_wants(tmp_path, data):
    idx = load_images(data, (1, 8, 8), NAMES)
    write_pictures(tmp_path / "pictures", idx.train, idx.train_label)
    found = load_images(tmp_path / "pictures", (1, 8, 8), None)
    turned = load_images(tmp_path / "pictures", (1, 8, 8), NAMES[::-1])
    assert torch.equal(turned.train_label, 1 - found.train_label)
    assert load_images(tmp_path / "pictures", (1, 8, 8), []).labels == ()
    with pytest.raises(UsageError, match="has the classes left, right, the configuration has the labels up, down"):
        load_images(tmp_path / "pictures", (1, 8, 8), ["up", "down"])


def test_colours_and_sizes_fit_the_samples(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, size in (("small", (4, 6)), ("wide", (40, 16)), ("tall", (16, 64)), ("exact", (8, 8))):
        Image.new("RGB", size, (200, 0, 0)).save(folder / f"{name}.png")
    colour = load_images(folder, (3, 8, 8), None)
    assert colour.labels == ()
    assert colour.resized == 2
    everything = torch.cat([colour.train, colour.test])
    assert everything.shape == (4, 3, 8, 8)
    # The small one is 4 wide and 6 high, in the middle of black.
    assert sorted((image[0] == 200).sum().item() for image in everything) == [24, 64, 64, 64]
    grey = load_images(folder, (1, 8, 8), None)
    assert torch.cat([grey.train, grey.test]).shape == (4, 1, 8, 8)


def test_a_class_whose_name_is_no_text_is_refused(tmp_path):
    folder = Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9"))
    folder.mkdir()
    for i in range(2):
        with (folder / f"{i}.png").open("wb") as file:
            Image.new("L", (8, 8)).save(file, "PNG")
    with pytest.raises(UsageError, match=r"the name 'caf\\udce9' is not text in UTF-8; rename it"):
        load_images(tmp_path, (1, 8, 8), None)


def quarters(width, height):
    """Four colours: red, green above blue, white."""
    image = Image.new("RGB", (width, height), (255, 0, 0))
    image.paste((0, 255, 0), (width // 2, 0, width, height // 2))
    image.paste((0, 0, 255), (0, height // 2, width // 2, height))
    image.paste((255, 255, 255), (width // 2, height // 2, width, height))
    return image


def corners(folder, image, **options):
    """A picture as it is read for 8x8 in colour: the whole, and its corners from the upper left, row by row."""
    for part in ("train", "test"):
        (folder / part).mkdir(parents=True)
        image.save(folder / part / "x.png", **options)
    found = load_images(folder, (3, 8, 8), None).train[0]
    return found, [tuple(found[:, y, x].tolist()) for y in (0, 7) for x in (0, 7)]


def test_pictures_are_upright_whole_and_in_the_middle(tmp_path):
    exif = Image.Exif()
    # The camera was held on its side: a quarter turn to the right.
    exif[0x0112] = 6
    assert corners(tmp_path / "turned", quarters(8, 8), exif=exif)[1] == [BLUE, RED, WHITE, GREEN]
    # Four wide and six high: a border of two on each side, and of one above and below.
    found, black = corners(tmp_path / "small", quarters(4, 6))
    assert black == [BLACK] * 4
    assert torch.equal(found[:, 1:7, 2:6], torch.tensor(np.asarray(quarters(4, 6))).permute(2, 0, 1))
    # Twice as wide as it should be: the middle half.
    wide = Image.new("RGB", (16, 8))
    wide.paste(quarters(8, 8), (4, 0))
    assert corners(tmp_path / "wide", wide)[1] == [RED, GREEN, BLUE, WHITE]
    deep = Image.fromarray(np.zeros((8, 8), dtype=np.uint16))
    with pytest.raises(UsageError, match="more than 8 bits"):
        corners(tmp_path / "deep", deep)


def test_validation_is_held_out_and_stray_pictures_are_refused(tmp_path, data):
    idx = load_images(data, (1, 8, 8), NAMES)
    write_pictures(tmp_path / "pictures/train", idx.train, idx.train_label)
    write_pictures(tmp_path / "pictures/validation", idx.test, idx.test_label)
    found = load_images(tmp_path / "pictures", (1, 8, 8), None)
    assert (len(found.train), len(found.test)) == (len(idx.train), len(idx.test))
    (tmp_path / "pictures/train/stray.png").write_bytes(png(idx.train[0, 0]))
    with pytest.raises(UsageError, match=r"stray\.png lies beside the class folders"):
        load_images(tmp_path / "pictures", (1, 8, 8), None)


def test_bad_data_is_refused_with_its_name(tmp_path, data):
    with pytest.raises(UsageError, match="no training data"):
        load_images(tmp_path / "nowhere", (1, 8, 8), None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no training data"):
        load_images(tmp_path / "empty", (1, 8, 8), None)
    idx = load_images(data, (1, 8, 8), NAMES)
    with pytest.raises(UsageError, match="label 1 is out of range"):
        load_images(data, (1, 8, 8), ["only"])
    write_pictures(tmp_path / "pictures", idx.train[:10], idx.train_label[:10])
    (tmp_path / "pictures/left/notes.txt").write_text("not a picture")
    with pytest.raises(UsageError, match=r"notes\.txt is not an image"):
        load_images(tmp_path / "pictures", (1, 8, 8), None)
    whole = png(idx.train[0, 0])
    (tmp_path / "pictures/left/notes.txt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match=r"notes\.txt is a broken image"):
        load_images(tmp_path / "pictures", (1, 8, 8), None)
    (tmp_path / "hub").mkdir()
    pq.write_table(pa.table({"picture": [b"x"]}), tmp_path / "hub/train.parquet")
    with pytest.raises(UsageError, match=r"has the columns picture \(binary\), expected `image`"):
        load_images(tmp_path / "hub", (1, 8, 8), None)
    picture = png(torch.zeros(8, 8, dtype=torch.uint8))
    pq.write_table(pa.table({"image": [picture] * 100}), tmp_path / "hub/train.parquet")
    written = bytearray((tmp_path / "hub/train.parquet").read_bytes())
    written[20:60] = bytes(40)
    (tmp_path / "hub/train.parquet").write_bytes(written)
    with pytest.raises(UsageError, match=r"train\.parquet(: row 0 is| cannot be read beyond row 0)"):
        load_images(tmp_path / "hub", (1, 8, 8), None)
    path = data / "train-images-idx3-ubyte.gz"
    packed = path.read_bytes()
    path.write_bytes(packed[:100] + bytes(50) + packed[150:])
    with pytest.raises(UsageError, match="not a complete IDX file"):
        load_images(data, (1, 6, 6), NAMES)
    path.write_bytes(gzip.compress(gzip.decompress(packed)[:-1]))
    with pytest.raises(UsageError, match="not a complete IDX file"):
        load_images(data, (1, 8, 8), NAMES)
