"""Files of prompts as people have them, and what is refused."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlem_dist.engine.prompts import read_prompts
from mlem_dist.errors import UsageError

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=50)


@given(st.lists(st.tuples(TEXTS, st.none() | TEXTS), min_size=1))
def test_lines_of_json_are_read_as_they_were_written(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    lines = [json.dumps({"prompt": prompt, "negative_prompt": negative}) for prompt, negative in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    prompts, negative_prompts = read_prompts(path, None)
    assert prompts == [prompt for prompt, _ in rows]
    if any(negative is not None for _, negative in rows):
        assert negative_prompts == [negative for _, negative in rows]
    else:
        assert negative_prompts is None


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
    assert read_prompts(path, "ugly") == (prompts, "ugly")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty, expected a prompt in each line"),
        (b"\xff\xfea", "cannot be read: it is not text in UTF-8"),
        (b"{", "line 1 is not JSON"),
        (b'{"prompt": "a"}\n\n', "line 2 is not JSON"),
        (b'["a"]', "line 1 is not an object with a prompt"),
        (b'{"text": "a"}', "line 1 is not an object with a prompt"),
        (b'{"prompt": "a", "id": 3}', "line 1 has 'id', expected prompt and negative_prompt only"),
        (b'{"prompt": "a"}\n{"prompt": 3}', "prompt in line 2 is 3, expected a text"),
        (b'{"prompt": "a", "negative_prompt": ["b"]}', r"negative_prompt in line 1 is \['b'\], expected a text"),
        (b'{"prompt": "a"}\n{"prompt": null}', "line 2 has the prompt null"),
    ],
)
def test_what_is_no_prompt_is_refused_by_its_line(tmp_path, content, message):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        read_prompts(path, None)


def test_negative_prompts_come_from_one_place(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a", "negative_prompt": "b"}')
    with pytest.raises(UsageError, match=r"has negative prompts of its own; leave out either"):
        read_prompts(path, "ugly")
    with pytest.raises(UsageError, match=r"nothing\.txt cannot be read: No such file"):
        read_prompts(tmp_path / "nothing.txt", None)
