import sys

from mlem_dist.report.progress import parts_bar


def test_a_stage_is_one_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with parts_bar() as told:
        for stage in ("first", "second"):
            for done in range(5):
                told(stage, done + 1, 5)
    shown = capsys.readouterr().err
    assert shown.count("\n") == 2
    assert "first: 100%" in shown
    assert "second: 100%" in shown
