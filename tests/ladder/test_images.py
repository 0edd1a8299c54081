import gzip
import io
import json
import os
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageCms

from mlem_dist.errors import UsageError
from mlem_dist.ladder.images import Images, load_images

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
    (tmp_path / "pictures/left/other.png").write_text("not a picture")
    with pytest.raises(UsageError, match=r"other\.png is not an image"):
        load_images(tmp_path / "pictures", (1, 8, 8), None)
    whole = png(idx.train[0, 0])
    (tmp_path / "pictures/left/other.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match=r"other\.png is a broken image"):
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


def fill(folder, sizes):
    """A small dataset: so many pictures in each folder, so many rows with these labels in turn in each Parquet file."""
    for name, content in sizes.items():
        path = folder / name
        if path.suffix == ".parquet":
            n, labels = content
            grey = torch.zeros(n, 1, 8, 8, dtype=torch.uint8)
            write_parquet(path, grey, torch.tensor([labels[i % len(labels)] for i in range(n)]))
        else:
            path.mkdir(parents=True, exist_ok=True)
            for i in range(content):
                (path / f"{i}.png").write_bytes(png(torch.full((8, 8), i, dtype=torch.uint8)))
    return folder


def counts(images: Images):
    return len(images.train), len(images.test), images.labels


CATS_AND_DOGS = ("cat", "dog")


def in_classes(**sizes):
    return {f"{part}/{name}": n for part, n in sizes.items() for name in CATS_AND_DOGS}


@pytest.mark.parametrize(
    ("train", "held"),
    [
        ("train", "val"),
        ("train", "valid"),
        ("training", "dev"),
        ("Train", "Test"),
        ("TRAIN", "Evaluation"),
        ("tRaIn", "vAl"),
        ("traindata", "TestData"),
        ("trainA", "testA"),
        ("training_set", "test_set"),
        ("train2017", "val2017"),
        ("birds_train", "birds_test"),
    ],
)
def test_parts_of_a_dataset_are_no_classes_whatever_their_names(tmp_path, train, held):
    pictures = fill(tmp_path / "pictures", in_classes(**{train: 4, held: 3}))
    assert counts(load_images(pictures, (1, 8, 8), None)) == (8, 6, CATS_AND_DOGS)
    content = {train: (8, [0, 1]), held: (6, [0, 1])}
    for form in ("{}.parquet", "data/{}-00000-of-00001.parquet", "data/cifar10-{}.parquet", "{}/0000.parquet"):
        hub = fill(tmp_path / form.replace("/", "_"), {form.format(part): rows for part, rows in content.items()})
        assert counts(load_images(hub, (1, 8, 8), None)) == (8, 6, tuple(NAMES))


def test_the_test_part_is_preferred_to_the_validation_part(tmp_path):
    layout = in_classes(train=4, val=3, test=2) | {"annotations": 0}
    (fill(tmp_path / "pictures", layout) / "annotations/0.xml").write_text("of the pictures")
    assert counts(load_images(tmp_path / "pictures", (1, 8, 8), None)) == (8, 4, CATS_AND_DOGS)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"train": 2, "cat": 2}, "parts of a dataset, train, and others with pictures, cat; move the others elsewhere"),
        (in_classes(test=2, val=2), "only held-out parts by name, test, val; rename the folder to train on to train"),
        (in_classes(train=2, Train=2), "several folders for the same part of a dataset by name, Train, train; join"),
        (in_classes(archive=2) | {"archive/test/cat": 2}, r"archive/test, by its name .* give \S*archive instead"),
        (
            {"cat/train": 2, "cat/val": 2, "dog": 2},
            "cat/val, by its name a held-out part of a dataset, is in the class",
        ),
        (in_classes(**{"train/train": 2, "train/val": 2}), "has no class folders but train, val, parts of a dataset"),
        (
            {"train/cat": 2, "train/dog": 2, "val/cat": 2},
            "val has the classes cat, expected those of .*/train: cat, dog",
        ),
        ({"test.parquet": (2, [0]), "dev.parquet": (2, [0])}, "every Parquet file in .* is of a held-out part"),
        (
            {"train-test.parquet": (2, [0])},
            "train-test.parquet is by its name of several parts of a dataset, test, tra",
        ),
        ({"train.parquet": (2, [0]), "more.parquet": (2, [0])}, "train.parquet is of the training part .*more.parquet"),
    ],
)
def test_parts_that_cannot_be_told_from_classes_are_refused(tmp_path, layout, message):
    with pytest.raises(UsageError, match=message):
        load_images(fill(tmp_path / "pictures", layout), (1, 8, 8), None)


def test_classes_may_have_names_like_parts_where_they_are_none(tmp_path):
    trains = fill(tmp_path / "trains", {"bullet_train": 2, "steam_train": 2, "bus": 2})
    assert load_images(trains, (1, 8, 8), None).labels == ("bullet_train", "bus", "steam_train")
    vehicles = fill(tmp_path / "vehicles", {"train/bus": 2, "train/train": 2})
    assert load_images(vehicles, (1, 8, 8), None).labels == ("bus", "train")


def test_what_is_hidden_or_of_the_system_is_passed_over_at_every_depth(tmp_path):
    layout = {"cat": 4, "cat/.ipynb_checkpoints": 2, "cat/kittens/.old/more": 2, "dog": 3, "lost+found": 0}
    pictures = fill(tmp_path / ".cache/pictures", layout)
    (pictures / "._train-images-idx3-ubyte").write_text("by macOS")
    assert counts(load_images(pictures, (1, 8, 8), None)) == (6, 1, CATS_AND_DOGS)
    hub = fill(tmp_path / "hub", {"data/train.parquet": (8, [0, 1]), "data/.tmp/test.parquet": (4, [0, 1])})
    (hub / "data/._train.parquet").write_text("by macOS")
    assert counts(load_images(hub, (1, 8, 8), None)) == (7, 1, tuple(NAMES))


def test_links_are_followed_at_every_depth(tmp_path):
    fill(tmp_path, {"pictures/cat/deep": 4, "pictures/dog": 3, "more/inner": 3, "data.parquet": (8, [0, 1])})
    deep = tmp_path / "pictures/cat/deep"
    (deep / "more").symlink_to("../../../more")
    (deep / "9.png").symlink_to("0.png")
    (deep / ".lost").symlink_to("nowhere")
    (tmp_path / "pictures/owl").symlink_to("../more", target_is_directory=True)
    assert counts(load_images(tmp_path / "pictures", (1, 8, 8), None)) == (13, 1, ("cat", "dog", "owl"))
    (tmp_path / "hub/default").mkdir(parents=True)
    (tmp_path / "hub/default/train.parquet").symlink_to("../../data.parquet")
    assert counts(load_images(tmp_path / "hub", (1, 8, 8), None)) == (7, 1, tuple(NAMES))


@pytest.mark.parametrize(
    ("link", "target", "message"),
    [
        ("owl", "nowhere", "owl is a link to nothing; mend or remove it"),
        ("cat/9.png", "nowhere.png", r"cat/9\.png is a link to nothing"),
        ("cat/deep/more", "../../nowhere", "cat/deep/more is a link to nothing"),
        ("cat/deep/self", "self", "cat/deep/self cannot be read: .*symbolic links"),
        ("cat/deep/up", "..", "cat/deep/up is a link to a folder that it lies in; remove it"),
        ("cat/deep/up", "../..", "cat/deep/up is a link to a folder that it lies in; remove it"),
    ],
)
def test_links_that_lead_nowhere_are_refused(tmp_path, link, target, message):
    pictures = fill(tmp_path / "pictures", {"cat": 2, "cat/deep": 2, "dog": 2})
    (pictures / link).symlink_to(target)
    with pytest.raises(UsageError, match=message):
        load_images(pictures, (1, 8, 8), None)


OTHERS = {
    "Thumbs.db": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1",
    "metadata.csv": b"file_name",
    "0.json": b"{}",
    "0.txt": b"P5 is how this caption begins, as a PGM file does",
    "paper.pdf": b"%PDF-1.4",
    "features.h5": b"\x89HDF\r\n\x1a\n" + bytes(50),
    "LICENSE": b"",
}
"""Files that lie among pictures and are none."""


def test_files_that_are_no_pictures_are_skipped_and_counted(tmp_path):
    for form, folders in {"flat": [""], "classes": ["", "cat", "dog/deep"], "parts": ["train/cat", "test/dog"]}.items():
        layout = {"flat": {"": 4}, "classes": {"cat": 4, "dog": 4}, "parts": in_classes(train=4, test=4)}[form]
        pictures = fill(tmp_path / form, layout)
        before = load_images(pictures, (1, 8, 8), None)
        for folder in folders:
            (pictures / folder).mkdir(exist_ok=True)
            for name, content in OTHERS.items():
                (pictures / folder / name).write_bytes(content)
            pq.write_table(pa.table({"url": ["https://"]}), pictures / folder / "metadata.parquet")
        after = load_images(pictures, (1, 8, 8), None)
        assert same(after, before)
        assert (before.skipped, after.skipped) == (0, len(folders) * (len(OTHERS) + 1))


def test_pictures_are_known_by_their_suffix_or_as_they_begin(tmp_path):
    pictures = fill(tmp_path / "pictures", {"": 6})
    for i, name in enumerate(("0", "1.JPG", "frame.0002", "3.png?width=8", "photo.jpg_large")):
        (pictures / f"{i}.png").rename(pictures / name)
    assert counts(load_images(pictures, (1, 8, 8), None)) == (5, 1, ())
    for name in ("broken.jpeg", "empty.TIF", "phone.heic"):
        (pictures / name).write_bytes(b"")
        with pytest.raises(UsageError, match=f"{name} is not an image"):
            load_images(pictures, (1, 8, 8), None)
        (pictures / name).unlink()


def test_a_folder_without_pictures_is_refused_with_the_number_of_its_other_files(tmp_path):
    for name, message in (("", "pictures has no pictures, no Parquet"), ("dog", "in the class folder .*/dog")):
        folder = fill(tmp_path / "pictures", {name: 0}) / name
        (folder / "0.txt").write_text("")
        (folder / "1.txt").write_text("")
        with pytest.raises(UsageError, match=rf"{message}.* \(files in it that are no pictures: 2\)"):
            load_images(tmp_path / "pictures", (1, 8, 8), None)


TRAIN, NONE = (20, [0, 1]), (6, [-1])


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"test": NONE, "validation": (4, [0, 1])}, (20, 4)),
        ({"test": NONE, "validation": NONE}, (18, 2)),
        ({"test-0": NONE, "test-1": NONE}, (18, 2)),
    ],
)
def test_a_held_out_part_without_labels_is_passed_over(tmp_path, files, expected):
    hub = fill(tmp_path / "hub", {f"data/{name}.parquet": rows for name, rows in ({"train": TRAIN} | files).items()})
    assert counts(load_images(hub, (1, 8, 8), None)) == (*expected, tuple(NAMES))
    # Where classes do not matter it is as good as another.
    assert len(load_images(hub, (1, 8, 8), []).test) == sum(n for name, (n, _) in files.items() if "test" in name)


@pytest.mark.parametrize("column", [{}, {"label": [None] * 4}, {"label": pa.array([None, -1] * 2, pa.int64())}])
def test_labels_may_be_absent_in_a_held_out_part(tmp_path, column):
    hub = fill(tmp_path / "hub", {"data/train.parquet": TRAIN})
    picture = png(torch.zeros(8, 8, dtype=torch.uint8))
    pq.write_table(pa.table({"image": [picture] * 4} | column), hub / "data/test.parquet")
    assert counts(load_images(hub, (1, 8, 8), None)) == (18, 2, tuple(NAMES))
    (hub / "data/test.parquet").rename(hub / "data/train-1.parquet")
    with pytest.raises(UsageError, match=r"have a column `label` and others|train-1\.parquet: row 0 has no label"):
        load_images(hub, (1, 8, 8), None)


def test_held_out_pictures_without_classes_are_passed_over(tmp_path):
    pictures = fill(tmp_path / "pictures", {"train/cat": 10, "train/dog": 10, "test": 6})
    assert counts(load_images(pictures, (1, 8, 8), None)) == (18, 2, CATS_AND_DOGS)
    assert counts(load_images(pictures, (1, 8, 8), [])) == (20, 6, ())
    fill(pictures, {"val/cat": 2, "val/dog": 2})
    assert counts(load_images(pictures, (1, 8, 8), None)) == (20, 4, CATS_AND_DOGS)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"train": TRAIN, "test": (4, [0, 1, -1])},
            r"/test\.parquet: row 2: label -1 is out of range for 2 labels; corr",
        ),
        ({"train": TRAIN, "test": (4, [0, 2])}, r"/test\.parquet: row 1: label 2 is out of range for 2 labels"),
        ({"train-0": TRAIN, "train-1": (4, [0, 1, 1, 7])}, r"/train-1\.parquet: row 3: label 7 is out of range"),
        ({"train": (4, [-1])}, r"/train\.parquet: row 0: label -1 is out of range .*\[\] to train without classes"),
    ],
)
def test_a_label_out_of_range_is_refused_with_its_file_and_row(tmp_path, files, message):
    hub = fill(tmp_path / "hub", {f"data/{name}.parquet": rows for name, rows in files.items()})
    with pytest.raises(UsageError, match=message):
        load_images(hub, (1, 8, 8), None)


def test_parquet_is_read_at_every_depth(tmp_path):
    rows = {"train": TRAIN, "validation": (4, [0, 1])}
    for form in ("default/{}/0000.parquet", "default/partial-{}/0.parquet", "a/b/c/{}-0.parquet", "{}/a/0.PARQUET"):
        files = {form.lower().format(part): rows[part] for part in rows}
        hub = fill(tmp_path / form.replace("/", "_"), files | {"assets": 1})
        for file in files:
            (hub / file).rename((hub / file).with_suffix(Path(form).suffix))
        assert counts(load_images(hub, (1, 8, 8), None)) == (20, 4, tuple(NAMES))


def test_several_parquet_datasets_are_refused_where_none_is_in_the_usual_place(tmp_path):
    hub = fill(tmp_path / "hub", {f"{name}/train/0000.parquet": TRAIN for name in ("default", "other")})
    with pytest.raises(UsageError, match=r"several datasets, in \S*/default, \S*/other; give one of these folders"):
        load_images(hub, (1, 8, 8), None)
    assert len(load_images(hub / "other", (1, 8, 8), None).train) == 18
    fill(hub, {"data/train.parquet": (10, [0, 1])})
    assert len(load_images(hub, (1, 8, 8), None).train) == 9


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_of_eight_bits_is_taken(tmp_path, mode, channels):
    picture = Image.new("RGB", (8, 8), WHITE if mode in ("1", "L", "LA") else (204, 51, 51))
    expected = np.asarray(picture.convert("L" if channels == 1 else "RGB")).reshape(8, 8, channels)
    if mode == "LAB":
        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        picture = ImageCms.profileToProfile(picture, *profiles, outputMode="LAB")
    elif mode == "PA":
        picture = picture.convert("P")
    for i in range(2):
        picture.convert(mode).save(tmp_path / f"{i}.tif")
    pixels = load_images(tmp_path, (channels, 8, 8), None).train[0].permute(1, 2, 0).numpy()
    # LAB and YCbCr are rounded.
    assert abs(pixels.astype(int) - expected).max() <= 4


def test_grey_with_premultiplied_alpha_is_taken(tmp_path):
    buffer = io.BytesIO()
    Image.new("LA", (8, 8), (100, 255)).save(buffer, "TIFF")
    # The tag 338, ExtraSamples: one short, 2 for alpha and 1 for premultiplied alpha.
    tag = struct.pack("<HHIH", 338, 3, 1, 2)
    for i in range(2):
        (tmp_path / f"{i}.tif").write_bytes(buffer.getvalue().replace(tag, struct.pack("<HHIH", 338, 3, 1, 1)))
    with Image.open(tmp_path / "0.tif") as image:
        assert image.mode == "La"
    assert load_images(tmp_path, (1, 8, 8), None).train.unique().tolist() == [100]


def test_a_picture_is_refused_for_its_size_only_where_it_is_not_read(tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    fill(tmp_path, {"pictures": 2, "hub/train.parquet": (2, [0])})
    assert len(load_images(tmp_path / "pictures", (1, 8, 8), None).train) == 1
    assert not recwarn.list
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30)
    (tmp_path / "pictures/0.png").rename(tmp_path / "pictures/0")
    for folder, name in (("pictures", "pictures/0"), ("hub", r"train\.parquet: row 0")):
        with pytest.raises(
            UsageError, match=rf"{name} is of a size that cannot be taken \(.*64 pixels.*; scale it down"
        ):
            load_images(tmp_path / folder, (1, 8, 8), None)
