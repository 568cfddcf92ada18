"""A short run of `tests.fuzz.cni`; the long one is a script: `python -m tests.fuzz.cni 100000 SEED`."""

from __future__ import annotations

from tests.fuzz import cni

_CASES = 1500
_SEED = 5


def test_warm_and_cold_path_answer_mutated_input_alike_and_leave_nothing() -> None:
    statistics, findings = cni.run(_CASES, _SEED)
    assert findings == []
    # A machine on which nothing can be attached would pass everything above.
    assert statistics["cases"] == _CASES
    for plugin in ("flannel", "bridge", "host-local", "portmap", "loopback"):
        assert statistics[f"{plugin} ADD ok"] >= 20, statistics
        assert statistics[f"{plugin} ADD failed"] >= 20, statistics
        assert statistics[f"{plugin} DEL ok"] >= 20, statistics
    assert statistics["calls warm"] > 20 * statistics["calls declined"] > 0
    assert statistics["calls shim"] > 0 and statistics["calls process"] > 0
