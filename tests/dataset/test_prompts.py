"""Tables of prompts as people have them, and what is refused."""

import json
import os
import pickle
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub import COMMIT, serve
from hypothesis import given, settings
from hypothesis import strategies as st

from mlem_dist.api.arguments import find_prompts
from mlem_dist.dataset.prompts import BATCH_ROWS, RowReader, first_prompts, open_prompts, table_of_texts
from mlem_dist.errors import UsageError
from mlem_dist.ladder.ladder import Ladder
from mlem_dist.store import HubFile

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=50)


@settings(deadline=None)
@given(st.lists(st.tuples(TEXTS, st.none() | TEXTS), min_size=1))
def test_lines_of_json_are_read_as_they_were_written(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    lines = [json.dumps({"prompt": prompt, "negative_prompt": negative}) for prompt, negative in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    table = open_prompts(path)
    texts = table.texts(range(len(rows)), None)
    assert texts == {"prompt": [prompt for prompt, _ in rows], "negative_prompt": [negative for _, negative in rows]}


@pytest.mark.parametrize(
    ("content", "prompts"),
    [
        ("a cat\ndogs\n", ["a cat", "dogs"]),
        ("a cat\r\ndogs", ["a cat", "dogs"]),
        ("\ufeffa cat\n", ["a cat"]),
        ("a cat\n\nדג 🐟\u2028one line\n", ["a cat", "", "דג 🐟\u2028one line"]),
        ("\n", [""]),
    ],
)
def test_a_text_has_a_prompt_in_each_line(tmp_path, content, prompts):
    path = tmp_path / "prompts.txt"
    path.write_bytes(content.encode())
    table = open_prompts(path)
    assert table.texts(range(table.rows), "ugly") == {"prompt": prompts, "negative_prompt": ["ugly"] * len(prompts)}


def test_blank_lines_between_json_rows_are_no_rows(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n\n{"prompt": "b"}\n \n')
    assert open_prompts(path).texts(range(2), None)["prompt"] == ["a", "b"]
    assert open_prompts(path).rows == 2


def test_csv_keeps_texts_as_texts(tmp_path):
    path = tmp_path / "prompts.csv"
    path.write_text('caption,n,negative_prompt\n"two\nlines",1,NA\n007,2,\n2020-01-01,3,"say ""no"""\n')
    table = open_prompts(path, "caption")
    texts = table.texts(range(3), None)
    assert texts == {
        "prompt": ["two\nlines", "007", "2020-01-01"],
        "negative_prompt": ["NA", "", 'say "no"'],
    }
    assert table.stored(range(3), None)["n"].to_pylist() == [1, 2, 3]


@settings(deadline=None)
@given(
    st.integers(1, 3 * BATCH_ROWS),
    st.integers(200, 2 * BATCH_ROWS),
    st.lists(st.tuples(st.integers(0), st.integers(1, 300)), min_size=1, max_size=5),
)
def test_rows_are_read_in_any_order(tmp_path_factory, rows, group, parts):
    path = tmp_path_factory.mktemp("rows") / "table.parquet"
    pq.write_table(pa.table({"n": range(rows), "other": range(rows)}), path, row_group_size=group)
    reader = RowReader(path, ["n"])
    for first, number in parts:
        start = first % rows
        stop = min(rows, start + number)
        assert reader.read(start, stop).to_pydict() == {"n": [*range(start, stop)]}


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(1, 4), st.integers(0, 40), st.integers(1, 9))
def test_samples_take_rows_in_turn(tmp_path_factory, rows, images, first, number):
    """Samples beyond the last row, which complete a block, have that row."""
    columns = {
        "prompt": [f"p{i}" for i in range(rows)],
        "seed": [None, *range(10, 10 + rows - 1)],
        "more": [[1]] * rows,
    }
    memory = pa.table(columns, pa.schema({"prompt": pa.string(), "seed": pa.int32(), "more": pa.list_(pa.int8())}))
    path = tmp_path_factory.mktemp("rows") / "table.parquet"
    pq.write_table(memory, path)
    table = pickle.loads(pickle.dumps(open_prompts(path, images=images)))
    samples = range(first, first + number)
    rows_of = [min(sample // images, rows - 1) for sample in samples]
    assert table.texts(samples, None)["prompt"] == [f"p{row}" for row in rows_of]
    seeds = table.seeds(samples, [1000] * number)
    assert seeds == [9 + row + sample % images if row else 1000 for sample, row in zip(samples, rows_of, strict=True)]
    stored = table.stored(samples, "ugly")
    assert list(stored) == ["prompt", "more", "negative_prompt"]
    assert [field.name for field in table.stored_schema("ugly")] == ["prompt", "negative_prompt", "seed", "more"]
    assert stored["more"].type == pa.list_(pa.int8())


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (
            "times.csv",
            "prompt,when,at,seed,empty\na,2024-01-01 10:00:00,10:00:01,,\nb,2024-01-02 10:00:00,10:00:02,,\n",
        ),
        ("lists.jsonl", '{"prompt": "a", "tags": [["x"], null], "seed": null}\n{"prompt": "b", "more": {"n": 1}}\n'),
    ],
)
def test_a_converted_table_has_the_columns_of_the_rows_in_memory(tmp_path, name, content):
    """Their types are a part of the configuration, by which an interrupted run goes on."""
    path = tmp_path / name
    path.write_text(content)
    memory = open_prompts(path)
    memory.published(tmp_path / "work")
    converted = open_prompts(path, work=tmp_path / "work")
    assert not isinstance(converted.source, pa.Table)
    assert converted.stored_schema(None) == memory.stored_schema(None)
    assert converted.stored(range(2), None) == memory.stored(range(2), None)
    assert converted.seeds(range(2), [3, 4]) == memory.seeds(range(2), [3, 4]) == [3, 4]


@pytest.mark.parametrize("kind", [pa.string_view(), pa.large_string(), pa.dictionary(pa.int16(), pa.string())])
def test_prompts_may_be_of_every_type_of_texts(tmp_path, kind):
    path = tmp_path / "prompts.parquet"
    pq.write_table(
        pa.table({"prompt": pa.array(["a", "b"]).cast(kind), "other": pa.array(["c", "d"]).cast(kind)}), path
    )
    table = open_prompts(path, images=2)
    assert table.texts(range(5), None)["prompt"] == ["a", "a", "b", "b", "b"]
    assert table.stored(range(1, 3), None)["other"].to_pylist() == ["c", "d"]


def test_a_refused_csv_ends_the_interpreter_in_order(tmp_path):
    path = tmp_path / "prompts.csv"
    path.write_text("caption\na\nb\n")
    check = "import sys; from mlem_dist.dataset.prompts import open_prompts, Path; open_prompts(Path(sys.argv[1]))"
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", check, str(path)], capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert "has no column 'prompt'; expected one of its columns, caption" in done.stderr


def test_a_table_in_memory_is_written_once(tmp_path):
    table = table_of_texts(["a", "b"], [None, "c"])
    file = table.published(tmp_path)
    assert file.digest == table.digest
    assert file.texts(range(2), None) == table.texts(range(2), None)
    (path,) = tmp_path.iterdir()
    before = path.stat()
    table.published(tmp_path)
    assert path.stat() == before


BAD = {
    "empty.txt": (b"", "is empty, expected a prompt in each line"),
    "bytes.txt": (b"\xff\xfea", "cannot be read: it is not text in UTF-8"),
    "a.jsonl": (b"{", "line 1 is not JSON"),
    "b.jsonl": (b'{"prompt": "a"}\n\n[', "line 3 is not JSON"),
    "c.jsonl": (b'["a"]', "line 1 is not an object with a prompt"),
    "d.jsonl": (b'{"text": "a"}', "has no column 'prompt'; expected one of its columns, text, as `prompt_column`"),
    "e.jsonl": (b'{"prompt": "a"}\n{"prompt": 3}', "the values of 'prompt' have no common type"),
    "f.jsonl": (b'{"prompt": "a", "negative_prompt": ["b"]}', "'negative_prompt' is of list.*, expected texts"),
    "g.jsonl": (b'{"prompt": "a"}\n{"prompt": null}', "prompt of row 1, counted from 0, is null, expected a text"),
    "h.jsonl": (b'{"prompt": "a", "id": 1, "id": 2}', "line 1 has 'id' twice"),
    "i.jsonl": (b'{"prompt": "a", "width": 512}', "the dataset has a column 'width' of its own"),
    "j.jsonl": (b'{"prompt": "a", "sample_id": 5}', "the dataset has a column 'sample_id' of its own"),
    "k.jsonl": (b'{"prompt": "a", "seed": 1.5}', "the column 'seed' is of double, expected integers"),
    "l.jsonl": (b'{"prompt": "a", "seed": -1}', "seed of row 0, counted from 0, is -1, expected 0 to 4294967295"),
    "m.jsonl": (b'{"prompt": "a", "seed": 4294967296}', "seed of row 0, counted from 0, is 4294967296"),
    "n.jsonl": (b'{"prompt": "a", "guidance_scale": "7"}', "'guidance_scale' is of string, expected numbers"),
    "o.jsonl": (b'{"prompt": "a", "guidance_scale": NaN}', "guidance_scale of row 0, counted from 0, is nan"),
    "p.jsonl": (b'{"prompt": "a", "guidance_scale": -2}', "guidance_scale of row 0, counted from 0, is -2"),
    "q.csv": (b"prompt,prompt\na,b\n", "it has the column 'prompt' twice"),
    "r.csv": (b"prompt,n\n", "it has no rows"),
    "s.csv": (b"prompt,n\na,1\nb\n", "cannot be read: .*Expected 2 columns"),
    "t.parquet": (b"PAR1", "cannot be read"),
    "u.json": (b'[{"prompt": "a"}]', "expected a name that ends in .parquet, .jsonl, .csv or .txt"),
    "v.tsv": (b"prompt\tn\n", "expected a name that ends in"),
    "w.jsonl": (b'{"prompt": "\\ud83d"}', "cannot be read: it is not text in UTF-8"),
    "x.jsonl": (b'{"prompt": "a", "m": {}}', "cannot be read: Cannot write struct type 'm'"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_table_of_prompts_is_refused_in_one_sentence(tmp_path, name):
    content, message = BAD[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message) as refused:
        open_prompts(path)
    assert "\n" not in str(refused.value)


def test_prompts_for_measurements_may_come_from_a_dataset(tmp_path):
    path = tmp_path / "dataset.parquet"
    pq.write_table(pa.table({"image": [b"png", b"png"], "prompt": ["a", "b"], "width": [1, 1]}), path)
    with pytest.raises(UsageError, match="the dataset has a column 'image' of its own"):
        open_prompts(path)
    assert first_prompts(str(path), "prompt") == ("a", "b")
    table, _ = find_prompts(path, Ladder.load("garments"))
    assert table.first_texts() == ("a", "b")


@pytest.mark.parametrize("statistics", [True, False])
@pytest.mark.parametrize("bad", ["prompt", "seed"])
def test_values_of_parquet_are_checked_by_row(tmp_path, statistics, bad):
    rows = [{"prompt": f"p{i}", "seed": i} for i in range(100)]
    rows[77][bad] = None if bad == "prompt" else 2**32
    path = tmp_path / "prompts.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=20, write_statistics=statistics)
    with pytest.raises(UsageError, match=f"{bad} of row 77, counted from 0, is (null|4294967296), expected"):
        open_prompts(path)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"nothing\.txt cannot be read: No such file"):
        open_prompts(tmp_path / "nothing.txt")
    with pytest.raises(UsageError, match=r"cannot be read: Is a directory"):
        open_prompts(tmp_path)


READ = """
import sys
from mlem_dist.dataset.prompts import open_prompts
from mlem_dist.store import HubFile
table = open_prompts(HubFile.parse(sys.argv[1]))
print(table.source, table.texts(range(2), None))
"""


@pytest.mark.parametrize("name", ["a.parquet", "folder/b.jsonl"])
def test_a_table_on_the_hub_is_pinned_and_downloaded_once(tmp_path, name):
    folder = tmp_path / "hub" / "org" / "prompts"
    (folder / "folder").mkdir(parents=True)
    pq.write_table(pa.table({"prompt": ["a", "b"]}), folder / "a.parquet")
    (folder / "folder" / "b.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    with serve(tmp_path / "hub") as server:

        def read(url: str, **variables: str) -> subprocess.CompletedProcess:
            environment = os.environ | {"HF_ENDPOINT": server.address, "HF_HOME": str(tmp_path / "cache")} | variables
            command = [sys.executable, "-c", READ, url]
            return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)

        done = read(f"hf://datasets/org/prompts/{name}")
        assert done.returncode == 0, done.stderr
        assert "{'prompt': ['a', 'b'], 'negative_prompt': [None, None]}" in done.stdout
        assert name.endswith("jsonl") or f"org/prompts@{COMMIT}/{name}" in done.stdout
        assert server.served[f"org/prompts/{name}"] == (folder / name).stat().st_size
        again = read(f"hf://datasets/org/prompts@{COMMIT}/{name}", HF_HUB_OFFLINE="1")
        assert again.stdout == done.stdout
        missing = read("hf://datasets/org/prompts/none.parquet")
        assert (
            "UsageError: hf://datasets/org/prompts@main/none.parquet: the repository has no such file" in missing.stderr
        )


def test_other_urls_of_the_hub_are_refused():
    for url in ("hf://org/prompts/a.parquet", "hf://datasets/org", "hf://datasets/org/prompts"):
        with pytest.raises(UsageError, match="expected hf://datasets/OWNER/NAME/FILE"):
            HubFile.parse(url)
