# Copyright 2026 The alter-peft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""`alter-peft report` from the command line on, in this process."""

from __future__ import annotations

import pytest
from made_up_benchmark import make_benchmark, save, scores

from alter_peft.cli import main


@pytest.fixture
def folder(tmp_path):
    return make_benchmark(tmp_path / "out")


def test_report_beside_the_results(folder, capsys):
    main(["report", str(folder)])
    out = capsys.readouterr().out
    assert out.startswith("| model | forget P |") and "| alter (2 seeds) | 0.120 ± 0.014 |" in out
    assert out.endswith(f"\n\nreport: {folder / 'report.html'}\n")
    assert {"report.html", "report.md", "plane.png"} <= {path.name for path in folder.iterdir()}


def test_report_elsewhere(folder, tmp_path):
    before = sorted(folder.iterdir())
    output = tmp_path / "the report"
    main(["report", str(folder), "--output_dir", str(output)])
    assert sorted(folder.iterdir()) == before and (output / "plane.png").is_file()
    assert f"Made by `alter-peft report {folder} --output_dir '{output}'`." in (output / "report.md").read_text()


def test_bad_input_ends_with_code_2_and_one_line(folder, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("")
    other = make_benchmark(tmp_path / "other")
    save(other, "alter", 0, scores=scores(0.1, 0.5), curves={})
    for path in other.glob("oracle-*/result.json"):
        path.unlink()
    for argv, name in (
        ([str(tmp_path / "nowhere")], "`folder`"),
        ([str(tmp_path)], "result.json"),
        ([str(other)], "no oracle"),
        ([str(folder), "--output_dir", str(file)], "`output_dir`"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["report", *argv])
        assert ended.value.code == 2
        out, err = capsys.readouterr()
        assert name in err and err.startswith("alter-peft report: error: ") and err.count("\n") == 1 and not out
    assert not list(other.glob("*.png"))


def test_without_a_folder(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["report"])
    assert ended.value.code == 2 and "folder" in capsys.readouterr().err


def test_without_matplotlib(folder, capsys, monkeypatch):
    monkeypatch.setattr("alter_peft.evaluation.commands.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as ended:
        main(["report", str(folder)])
    assert ended.value.code == 2 and "pip install matplotlib" in capsys.readouterr().err
