"""The benchmark as a whole, with tunnels of no use: what is measured is written down, and so is what fails."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.benchmarks import __main__ as benchmark
from tests.benchmarks import results
from tests.benchmarks.measures import MEASURES, PROBES

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.benchmarks.load import Load
    from tests.benchmarks.tunnels import Commands

    Run = Callable[..., tuple[int, results.Results, dict[str, dict[str, str]]]]

QUICK = ["--ours", "none", "--seconds", "0.05"]
PEER = ["--peer", "other", "s {server_port}", "c {server_port} {listen_port} {target_port}"]


@pytest.fixture
def run(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs it with tunnels and arguments. Returns the exit code, the results as read, and the errors."""
    monkeypatch.setattr(benchmark, "Load", lambda _: load)

    def measured(peers: list[Commands], *arguments: str) -> tuple[int, results.Results, dict[str, dict[str, str]]]:
        output = tmp_path / "results.json"
        given = [part for peer in peers for part in ("--peer", peer.name, peer.server, peer.client)]
        code = benchmark.main([*QUICK, *arguments, "--output", str(output), *given])
        document = json.loads(output.read_text(encoding="utf-8"))
        errors = {name: measure["errors"] for name, measure in document["measures"].items()}
        return code, results.read(document), errors

    return measured


class TestRuns:
    def test_two_rounds(self, run: Run, forwarding: Callable[..., Commands]) -> None:
        wanted = "opens,bulk_up,bulk_down,echo_p50,echo_50,opens_10"
        code, found, errors = run([forwarding()], "--rounds", "2", "--only", wanted)
        assert code == 0
        assert found.rounds == 2
        assert set(found.measures) == {*wanted.split(","), "cpu_up", "cpu_down", "echo_p95"}
        for name, measure in found.measures.items():
            assert set(measure.values) == ({"fake-ws"} if name.startswith("cpu") else {"direct", "fake-ws"})
            assert all(value is not None and value >= 0 for values in measure.values.values() for value in values)
        assert not any(errors.values())
        assert found.commands["fake-ws"][0].endswith("{server_port}")
        assert "--only opens" in found.command
        assert {"python", "openssl", "cc", "fake-ws"} <= set(found.versions)

    def test_a_tunnel_that_changes_bytes_is_not_measured(self, run: Run, forwarding: Callable[..., Commands]) -> None:
        peers = [forwarding("wrong-ws", "flip"), forwarding("right-ws")]
        code, found, errors = run(peers, "--rounds", "1", "--only", "opens")
        assert code == 1
        values = found.measures["opens"].values
        assert values["wrong-ws"] == (None,)
        assert None not in values["right-ws"] + values["direct"]
        assert errors["opens"] == {"wrong-ws": "bulk: bulk up: what arrived is not what was sent"}

    def test_a_tunnel_that_does_not_start(
        self, run: Run, forwarding: Callable[..., Commands], capsys: pytest.CaptureFixture[str]
    ) -> None:
        code, found, errors = run([forwarding(server="false {server_port}")], "--rounds", "2", "--only", "bulk_up")
        assert code == 1
        assert found.measures["bulk_up"].values["fake-ws"] == (None, None)
        assert found.measures["cpu_up"].values["fake-ws"] == (None, None)
        assert "server ended with exit code 1" in errors["bulk_up"]["fake-ws"]
        assert "FAILED: fake-ws's server ended" in capsys.readouterr().out

    def test_what_cannot_be_measured_here_says_why(
        self, run: Run, forwarding: Callable[..., Commands], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("tests.benchmarks.stages.os.geteuid", lambda: 1000)
        code, found, errors = run([forwarding()], "--rounds", "1", "--only", "first_byte_80ms")
        assert code == 1
        assert found.measures["first_byte_80ms"].values == {"direct": (None,), "fake-ws": (None,)}
        assert errors["first_byte_80ms"]["direct"] == "not measured: network namespaces need root"

    def test_starting(self, run: Run, forwarding: Callable[..., Commands]) -> None:
        wanted = "start_version,start_server_ready"
        code, found, _ = run([forwarding()], "--rounds", "1", "--only", wanted)
        assert code == 0
        assert set(found.measures) == set(wanted.split(","))
        assert all(list(measure.values) == ["fake-ws"] for measure in found.measures.values())


class TestOptions:
    def test_all_measures_unless_named(self) -> None:
        chosen = benchmark.options([])
        assert chosen.probes == list(PROBES)
        assert list(chosen.tunnels) == ["ours-ws", "ours-wss"]
        assert chosen.rounds == 5

    @pytest.mark.parametrize(
        ("arguments", "complaint"),
        [
            (["--only", "dancing"], "'dancing' is none of"),
            (["--rounds", "0"], "more than 0"),
            (["--seconds", "0"], "more than 0"),
            (["--peer", "other", "s", "c"], "lacks {server_port}"),
            ([*PEER, *PEER], "two tunnels 'other'"),
        ],
    )
    def test_wrong_ones(self, arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as caught:
            benchmark.options(arguments)
        assert caught.value.code == 2
        assert complaint in capsys.readouterr().err

    def test_every_measure_has_one_probe(self) -> None:
        names = [name for probe in PROBES for name in probe.names]
        assert sorted(names) == sorted(MEASURES)
