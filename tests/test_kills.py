# SPDX-License-Identifier: Apache-2.0
"""Fifty times SIGKILL, at random moments: what is loaded then is the state before or the new one; the run goes on."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import pytest
from hub_server import HubServer


KILLS = int(os.environ.get("KILLS", 50))
PHASES = ("phase I", "training", "saving", "pushing")
REPO = "alice/killed"


class Runner:
    """The process of kills_run.py; it does one thing at a time."""

    def __init__(self, hub: HubServer, log: Path, stream: IO[str]) -> None:
        here = Path(__file__).parent
        environment = {
            **os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1,localhost", "HF_HOME": str(log.parent / "home"), "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)]),
        }  # fmt: skip
        self.hub, self.log = hub, log
        self.process = subprocess.Popen(
            [sys.executable, str(here / "kills_run.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=stream, env=environment, text=True, bufsize=1,
        )  # fmt: skip
        assert self.answer() == ["ready"]

    def answer(self) -> list[str]:
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip("\n").split(" ")

    def order(self, do: str, **options: Any) -> int:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **options}) + "\n")
        word, pid = self.answer()
        assert word == "pid"
        return int(pid)

    def finish(self) -> tuple[int, Any, dict[str, float]]:
        """The exit status, the result and when each phase began, once the order is done."""
        result, began = None, {}
        while (answer := self.answer())[0] != "exit":
            if answer[0] == "phase":
                began[" ".join(answer[1:-1])] = float(answer[-1])
            elif answer[0] == "result":
                result = json.loads(" ".join(answer[1:]))
            assert answer != [""], self.log.read_text()[-5000:]
        return int(answer[1]), result, began

    def do(self, do: str, **options: Any) -> Any:
        self.order(do, **options)
        status, result, self.began = self.finish()
        assert status == 0, self.log.read_text()[-5000:]
        return result

    def killed_in(self, phase: str, after: float, **options: Any) -> str | None:
        """Kills a training so many seconds after a phase began; the phase that it had come to, `None` if it ended."""
        pid = self.order("train", **options)
        while self.answer()[:-1] != ["phase", *phase.split(" ")]:
            pass
        time.sleep(after)
        with suppress(ProcessLookupError):  # it has ended
            os.kill(pid, signal.SIGKILL)
        status, _, began = self.finish()
        return [phase, *began][-1] if os.WIFSIGNALED(status) else None


@pytest.fixture
def runner(tmp_path) -> Iterator[Runner]:
    with HubServer({"hf_token": "alice"}) as hub, (tmp_path / "log").open("w") as log:
        runner = Runner(hub, tmp_path / "log", log)
        with runner.process:  # which ends with its input
            yield runner


def pushed(hub: HubServer, folder: Path) -> Path:
    """What the Hub has, as a folder."""
    for name, file in hub.repos[REPO].commits[hub.repos[REPO].branches["main"]].items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(file.content)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_fifty_kills(runner, tmp_path, capsys):
    chance, known, lasted = random.Random(0), {}, {}
    for version in ("a", "b"):
        place = tmp_path / f"whole-{version}"
        runner.do("train", folder=str(place), version=version, repo=f"alice/{version}")
        known[version] = str(place / "out")
        for name, following in zip(PHASES, (*PHASES[1:], "end"), strict=True):
            lasted[name] = max(lasted.get(name, 0), runner.began[following] - runner.began[name])
    folder, before, on_hub, count = tmp_path / "killed", "nothing", "nothing", Counter()
    for kill in range(KILLS):
        version, phase = "ab"[kill % 2], PHASES[(kill // 2) % len(PHASES)]
        options = {"folder": str(folder), "version": version, "repo": REPO}
        forget_cache(folder)
        while (at := runner.killed_in(phase, chance.random() * lasted[phase], **options)) is None:
            before = on_hub = version  # it was faster this time
        phase = "pushing" if at == "end" else at
        found = runner.do("look", folder=str(folder / "out"), known=known)
        assert found in ({before} if phase in PHASES[:2] else {before, version}), (kill, phase, found)
        if REPO in runner.hub.repos and "adapter_config.json" in files_of(runner.hub):
            there = runner.do("look", folder=str(pushed(runner.hub, tmp_path / f"hub-{kill}")), known=known)
            assert there in ({on_hub, version} if phase == "pushing" else {on_hub}), (kill, phase)
        count[phase, "new" if found == version != before else "as before"] += 1
        resumed = runner.do("train", resume=True, **options)["resumed"]
        count["resumed" if resumed else "begun again"] += 1
        before = on_hub = version
        assert runner.do("look", folder=str(folder / "out"), known=known) == version, (kill, phase, resumed)
        assert runner.do("look", folder=str(pushed(runner.hub, tmp_path / f"hub-{kill}-end")), known=known) == version
    with capsys.disabled():
        lines = [
            f"{' '.join(key) if isinstance(key, tuple) else key}: {times}"
            for key, times in sorted(count.items(), key=str)
        ]
        print(f"\n{KILLS} kills, no mixture. What was found: {', '.join(lines)}")


def files_of(hub: HubServer) -> dict[str, Any]:
    return hub.repos[REPO].commits[hub.repos[REPO].branches["main"]]


def forget_cache(folder: Path) -> None:
    """So that phase I is made, not read."""
    for file in (folder / "cache" / "alter_peft").glob("*"):
        file.unlink()
