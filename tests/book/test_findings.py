"""Numbers and verdicts from constructed records, where the answer is known."""

import dataclasses
import math
import statistics

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.stats

from cddbook import claims, findings, tables
from cddbook.figures import ch3_correlation
from cddbook.records import read_record
from cddbook.study import settings_by_accuracy
from cddlib import distill_recipe
from cddlib.plan import buffer_of, plan
from cddlib.runtime.config import config_hash

STARTS = (0, 4, 8)


# --- Records ----------------------------------------------------------------------------------------------------


def similarity(sign: float) -> dict:
    """Three probes whose image gradients agree (1), or whose first opposes the others (-1); steps of the size 0.1."""
    vectors = np.array([[1.0, 0], [sign, 0], [sign, 0]])
    products = np.concatenate([vectors, vectors]) @ np.concatenate([vectors, vectors]).T
    losses = np.ones(3)
    after = losses - 0.1 * products[:3, :3]
    return {"losses": losses.tolist(), "after": after.tolist(), "products": {"images": products.tolist()}}


def run(losses: list[list[float]], **metrics: object) -> dict:
    """A run of as many iterations as it has measurements, less one."""
    count = len(losses) - 1
    each = {"loss": 1.0, "matched": [[0, 0]], "seconds": 2.0}
    dense = {name: [value] * count for name, value in each.items()}
    probed = [[time, values] for time, values in enumerate(losses)]
    machine = {"threads": 1, "device": "a processor", "versions": {"torch": "2"}, "commit": "0123456789abcdef"}
    return {
        "changes": {},
        "metrics": {**dense, "probe_losses": probed, **metrics},
        "result": {"seconds": 60.0, "seconds_per_iteration": 2.0, "selected_iteration": 6, **machine},
        "evaluations": [],
    }


FIRST = {1: (0,), 2: (0,)}
"""Matching a later segment hurts the first one."""
ALL = {0: (1, 2), 1: (0, 2), 2: (0, 1)}


def correlation_record(replicates: int = 3, *, hurts: dict[int, tuple[int, ...]] = FIRST, ipc: int = 1) -> dict:
    """Every loss falls, except that matching a segment raises those of the segments that it `hurts`."""
    runs = {}
    for replicate in range(replicates):
        rng = np.random.default_rng(replicate)
        for row, start in enumerate(STARTS):
            slopes = np.full(3, -0.05)
            slopes[list(hurts.get(row, ()))] = 0.05
            noise = 0.001 * rng.normal(size=(12, 3))
            losses = 1 + np.arange(12)[:, None] * slopes + noise
            runs[f"replicate-{replicate}/matched-{start:02d}"] = run(losses.tolist())
        shared = 1 - 0.05 * np.arange(12)[:, None] + 0.02 * rng.normal(size=(12, 1)) + np.zeros(3)
        opposed = shared * [1, -1, 1] + [0, 2, 0]
        for control, losses, sign in (("sequential", opposed, -1.0), ("concurrent", shared, 1.0)):
            stages = [[0, similarity(1.0)], [11, similarity(sign)]]
            runs[f"replicate-{replicate}/{control}"] = run(losses.tolist(), gradient_similarity=stages)
    config = {"probe_starts": list(STARTS), "ipc": ipc, "expert_epochs": 2}
    return {"config": config, "runs": runs}


def comparison_record(seeds: int = 4, *, gain: float = 0.1, noise: float = 0.0) -> dict:
    """`concurrent` is `gain` more accurate than `sequential`, ewc lies between, and its error is lower by 0.2."""
    runs = {}
    for name, better, segments in (("sequential", 0.0, 1), ("ewc", gain / 2, 1), ("concurrent", gain, 4)):
        for seed in range(seeds):
            rng = np.random.default_rng([seed, segments])
            accuracy = 0.5 + better + seed / 100 + noise * float(rng.normal())
            # the window's last segment ends at epoch 4
            end = {"error": [1.0, 4.0 - 2 * (segments == 4), 9.0], "travelled": [2.0, 10.0, 11.0], "epoch": [2, 4, 6]}
            entry = run(
                [[3.0, 3.0]] * findings.SETTLED + [[1.0, 1.0], [0.8, 1.1], [0.9, 0.7], [0.7, 0.8]],
                validation_accuracy=[[0, [0.1]], [6, [accuracy, accuracy]]],
                accumulated_error=[[0, end], [6, end]],
            )
            entry["metrics"]["matched"] = [[[0, 0]]] * findings.SETTLED + [[[0, 0]], [[0, 4]], [[0, 0]]]
            entry["changes"] = {"segments": segments, "seed": seed}
            entry["evaluations"] = [{"synthetic": [accuracy], "random_real": [0.2, 0.3], "full": [0.9, 0.9]}]
            runs[f"{name}/seed-{seed}"] = entry
    config = {"probe_starts": [0, 4], "probe_expert": 0, "segments": 1, "replay": 0, "data": "digits", "ipc": 1}
    config |= {"width": 8, "student_steps": 3, "expert_epochs": 2, "window_start": 0, "window_end": 3}
    return {"config": config, "runs": runs}


@hypothesis.given(st.lists(st.floats(-10, 10), min_size=2, max_size=12))
def test_the_interval_is_students(values):
    hypothesis.assume(statistics.stdev(values) > 1e-6)
    found = findings.effect(values)
    low, high = scipy.stats.t.interval(
        0.95, len(values) - 1, statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
    )
    assert (found.low, found.mean, found.high) == pytest.approx((low, statistics.fmean(values), high), abs=1e-9)


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([1.0, 1.1, 0.9], "confirmed"),
        ([-1.0, -1.1, -0.9], "contradicted"),
        ([1.0, -1.0, 0.1], "not settled"),
        ([5.0], "not settled"),
        ([1.0, 1.1], "not settled"),
        ([0.0, 0.0, 0.0], "not settled"),
        ([1.0, math.nan, 1.0], "not settled"),
    ],
)
def test_verdicts(values, verdict):
    assert claims.verdict(findings.effect(values)) == verdict


# --- Correlation studies ----------------------------------------------------------------------------------------


def test_replicates_are_read_in_the_order_of_their_numbers():
    record = correlation_record(11)
    losses = findings.correlations(record).losses["matched"]
    tenth = [losses for _, losses in record["runs"]["replicate-10/matched-04"]["metrics"]["probe_losses"]]
    np.testing.assert_array_equal(losses[10, 1], tenth[findings.SETTLED :])


def test_what_hurts_is_negative_below_the_diagonal():
    found = findings.correlations(correlation_record())
    mean = found.pearson().mean(axis=0)
    assert (mean[1:, 0] < -0.9).all() and (mean[0, 1:] > 0.9).all()
    assert (found.net_change()[:, 1:, 0] > 0.3).all() and (found.net_change()[:, 0] < 0).all()
    p_values = found.p_values()
    assert (p_values[1:, 0] < 0.05).all() and p_values[0, 1] > 0.5 and (np.diagonal(p_values) == 1).all()
    assert np.argwhere(found.below).tolist() == [[1, 0], [2, 0], [2, 1]]
    assert np.argwhere(dataclasses.replace(found, epochs=5).below).tolist() == [[2, 0]]


def test_negative_table_has_a_row_a_measure():
    table = tables.negative_table({"toy": findings.correlations(correlation_record())})
    rows = [line for line in table.splitlines() if line.startswith("| toy")]
    assert len(rows) == 4
    assert "correlation of losses (the paper's) | 67% ± 0% | 0% ± 0%" in rows[0]
    assert "cosine of gradients, last images | 67% ± 0% | 67% ± 0% | -0.33 ± 0.00 | +1.00 ± 0.00" in rows[3]


def test_what_is_left_out_is_said():
    """One segment's loss rises at first, whatever is matched, and then falls."""
    record = correlation_record()
    for entry in record["runs"].values():
        entry["metrics"]["probe_losses"] = [[i, [1.0 + (i if i < 4 else 6 - i / 4)] * 3] for i in range(16)]
    (row,) = tables.transient_table({"toy": record}).splitlines()[2:]
    assert row == "| toy | +225.0, the same in all | -18.8, the same in all | -27.8, the same in all |"


# --- Comparisons ------------------------------------------------------------------------------------------------


def test_comparison_reads_what_each_run_reached():
    table = findings.comparison(comparison_record())
    assert table["variant"].drop_duplicates().tolist() == ["sequential", "ewc", "concurrent"]
    first = table.iloc[0]
    assert (first["test"], first["error"], first["undistilled"]) == (0.5, 0.4, False)
    # of the last three stages, 1 and 3 visit probe 0, and 2 visits probe 4; scores are minus the losses, for forgetting
    # means of two: only probe 0 was visited before the last of them
    assert first["forgetting"] == pytest.approx(-(0.8 + 0.9) / 2 + (0.9 + 0.7) / 2)
    assert first["backward"] == pytest.approx(-0.8 + 0.7)


def test_luck_is_not_forgotten():
    record = comparison_record(1)
    for entry in record["runs"].values():
        entry["metrics"] |= {"probe_losses": [[i, [0.5 if i == 20 else 1.0, 1.0]] for i in range(40)]}
        entry["metrics"] |= {"matched": [[[0, 0], [0, 4]]] * 39}
    assert findings.comparison(record)["forgetting"].tolist() == pytest.approx([0.5 / findings.SMOOTH / 2] * 3)


def test_curves_count_segments_and_seconds():
    table = findings.curves(comparison_record(1))
    last = table[table["iteration"] == 6].set_index("variant")
    assert last["matched"].to_dict() == {"sequential": 6, "ewc": 6, "concurrent": 24}
    assert (last["elapsed"] == 12).all() and last.loc["concurrent", "accuracy"] == pytest.approx(0.6)
    assert last["error"].to_dict() == {"sequential": 0.4, "ewc": 0.4, "concurrent": 0.2}
    record = comparison_record(1)
    for entry in record["runs"].values():
        entry["metrics"]["accumulated_error"] = [[6, {"error": [1.0], "travelled": [2.0], "epoch": [2]}]]
    assert not findings.at_equal(findings.curves(record), "error")  # over a single segment nothing accumulates


def test_probes_are_compared_at_equal_prices():
    """Sequential runs four iterations for one of the concurrent ones; its losses fall by 0.1 an iteration."""
    record = comparison_record(3)
    for name, entry in record["runs"].items():
        every, falls = (1, 0.3) if name.startswith("concurrent") else (4, 0.1)
        times = range(0, 8 * every + 1, every)
        entry["metrics"]["probe_losses"] = [[t, [5 - falls * t, 5 - falls * t]] for t in times]
        for key in ("loss", "matched", "seconds"):
            entry["metrics"][key] = entry["metrics"][key][:1] * (8 * every)
    found = findings.probes_at_equal(record, ("sequential", "concurrent"))
    ahead = {"after 32 matched segments": 2.4 - 3.2, "after 8 iterations": 2.4 - 0.8}
    differences = [findings.paired(t, "mean loss of the probes", "sequential", "concurrent") for t in found.values()]
    assert list(found) == list(ahead) and {difference.count for difference in differences} == {3}
    assert [difference.mean for difference in differences] == pytest.approx(list(ahead.values()))
    shown = claims.summary_table(claims.findings({}, {"toy": record})).splitlines()[2:]
    assert shown[7].endswith("(toy): *contradicted* | 1 (1 at equal iterations) | 1 |")
    measures = [row.measure for row in claims.findings({}, {"toy": record}) if "forgetting" in row.measure]
    assert measures, "segments that share an epoch, as below, are no test of it"
    overlapping = claims.findings({}, {"toy": {**record, "config": record["config"] | {"probe_starts": [0, 1]}}})
    assert not [row for row in overlapping if "forgetting" in row.measure]
    for name, entry in record["runs"].items():
        if name.startswith("sequential"):
            entry["metrics"]["probe_losses"] = [[t, [5 - 0.1 * t] * 2] for t in (*range(0, 32, 5), 32)]
    found = findings.probes_at_equal(record, ("sequential", "concurrent"))
    assert found["after 32 matched segments"]["average forgetting"].notna().all(), "though few places are shared"


def verdicts(found: list[claims.Finding], claim: str) -> list[str]:
    return [finding.verdict for finding in found if finding.claim == claim]


@pytest.mark.parametrize(
    ("hurts", "gain", "wanted"),
    [
        (ALL, 0.1, {"C1": "confirmed", "C3": "confirmed", "C4": "confirmed", "C6": "confirmed"}),
        ({}, -0.1, {"C1": "contradicted", "C3": "contradicted", "C6": "contradicted"}),
    ],
)
def test_records_that_agree_with_the_paper_or_contradict_it(hurts, gain, wanted):
    found = claims.findings(
        {"toy": correlation_record(hurts=hurts)}, {"toy": comparison_record(gain=gain, noise=0.001)}
    )
    assert {claim: verdicts(found, claim)[0] for claim in wanted} == wanted
    assert [finding.claim for finding in found] == sorted(finding.claim for finding in found)


def test_comparisons_that_say_the_opposite_contradict():
    """What one and several segments led to is exchanged; each still costs what it did."""
    record = comparison_record(noise=0.001)
    for name, entry in record["runs"].items():
        first, *rest = [2.0, 1.0, 1.0, 1.0, 1.0, 1.2, 1.4] if name.startswith("sequential") else [2.0] * 4 + [1.9] * 3
        seed = entry["changes"]["seed"] / 1000
        entry["metrics"]["probe_losses"] = [[t, [x + seed, x]] for t, x in enumerate([first, *rest])]
        entry["evaluations"].append({**entry["evaluations"][0], "network": "alexnet"})
    usual = claims.findings({}, {"toy": record})
    runs = record["runs"]
    for seed in range(4):
        one, several = runs[f"sequential/seed-{seed}"], runs[f"concurrent/seed-{seed}"]
        for part in ("metrics", "evaluations", "result"):
            one[part], several[part] = several[part], one[part]
    exchanged = claims.findings({}, {"toy": record})
    opposite = {"confirmed": "contradicted", "contradicted": "confirmed", "not settled": "not settled"}
    assert [opposite[finding.verdict] for finding in usual] == [finding.verdict for finding in exchanged]
    settled = {finding.claim for finding in usual if finding.verdict != "not settled"}
    assert settled == {"C4", "C5", "C6", "C7", "C8"}


@pytest.mark.parametrize(("ipc", "wanted"), [(1, ["confirmed"]), (10, []), (50, ["contradicted"])])
def test_c2_expects_the_other_side_of_many_images(ipc, wanted):
    assert verdicts(claims.findings({"toy": correlation_record(ipc=ipc)}, {}), "C2") == wanted
    assert verdicts(claims.findings({"toy": correlation_record(2, ipc=ipc)}, {}), "C1") == ["not settled"]


def test_c2_compares_few_and_many_images_of_the_same_data():
    few, many = correlation_record(ipc=1), correlation_record(ipc=50)
    for name, entry in many["runs"].items():
        if "matched-00" in name:
            for time, (_, losses) in enumerate(entry["metrics"]["probe_losses"]):
                losses[1] = 1 + 0.05 * time
    found = claims.findings({"toy, IPC 1": few, "toy, IPC 50": many, "other, IPC 1": few}, {})
    below, above = (finding for finding in found if finding.claim == "C2" and finding.setting == "toy")
    assert below.effect == "+0.00, the same in all, n = 3" and below.verdict == "not settled"
    assert above.effect == "+0.33, the same in all, n = 3" and above.verdict == "confirmed"
    assert not [finding for finding in found if finding.setting == "other" and finding.claim == "C2"]


@pytest.mark.parametrize(("peak", "wanted"), [(110.0, "confirmed"), (170.0, "contradicted"), (113.0, "not settled")])
def test_c8_compares_memory_above_the_start(peak, wanted):
    points = [
        {"implementation": "cddlib, K segments", "segments": k, "start_mb": 50, "peak_mb": mb + repeat, "seconds": k}
        for k, mb in ((1, 108.0), (4, 500.0), (8, peak))
        for repeat in (0, 1, 2)
    ]
    found = claims.findings({}, {}, {"measurements": points, "device": "a processor", "config": {"width": 128}})
    assert verdicts(found, "C7") == ["not tested"] and verdicts(found, "C8") == [wanted]
    least = f"1.1 minus {(peak - 49) / 59:.2f}, the memory of K = 8 over that of K = 1"
    assert found[-1].measure == f"{least}, one after the other; it takes 8.0 times as long"


def test_the_table_has_every_claim_once_and_every_finding():
    found = claims.findings({"toy": correlation_record()}, {"toy": comparison_record()})
    table = claims.claims_table(found)
    for claim, sentence in claims.CLAIMS.items():
        assert table.count(f"| **{claim}** |  | **{sentence}** |") == 1
    assert table.count("|  | toy |") == len(found)
    assert "| **C1** |" not in claims.claims_table(found, claims=("C2",))


def test_the_committed_records_give_findings_on_every_claim():
    found = claims.committed_findings()
    assert {finding.claim for finding in found} == set(claims.CLAIMS)


@pytest.mark.parametrize(
    ("search", "variant"), [("k1", "sequential"), ("k4", "concurrent"), ("ewc", "ewc"), ("si", "si")]
)
def test_remedies_were_compared_at_the_best_of_their_searches(search, variant):
    compared, searched = read_record("remedies-digits-ipc1"), read_record(f"rates-digits-{search}")
    config = {**compared["config"], **compared["runs"][f"{variant}/seed-0"]["changes"]}
    best = next(iter(settings_by_accuracy(searched)))
    assert best == ",".join(f"{part.split('=')[0]}={config[part.split('=')[0]]}" for part in best.split(","))


def test_heat_maps_are_centred_and_starred():
    found = findings.correlations(correlation_record())
    figure = ch3_correlation.heat_maps(
        {"losses": found.pearson(), "net": found.net_change()}, STARTS, significant={"losses": found.p_values()}
    )
    mesh = figure.axes[0].collections[0]
    assert mesh.get_clim() == (-1, 1)
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert ["*" in text for text in texts] == [False] * 3 + [True, False, False] * 2
    assert not any("*" in text.get_text() for text in figure.axes[1].texts)


def test_sign_agreement_and_what_is_drawn_of_it():
    found = ch3_correlation.transfers(findings.correlations(correlation_record()), {"images": 0.1})
    table = ch3_correlation.sign_agreement(found).splitlines()
    assert table[2:] == ["| on the first images | 100% | 0% |", "| on the last images | 100% | 67% |"]
    drawn = [axis.collections[0].get_offsets() for axis in ch3_correlation.transfer_prediction(found).axes]
    for points in drawn:
        assert len(points) == 27 and np.allclose(points[:, 0], points[:, 1])


def test_comparisons_in_a_table_and_in_words():
    record = comparison_record()
    table = tables.comparison_table(record)
    assert "| sequential | 51.5 ± 1.3 | 0.400 ± 0.000 |" in table and "over 4 distillations" in table
    assert "backward transfer for" not in table and "the best set, by validation" not in table
    record["runs"]["ewc/seed-0"]["result"]["selected_iteration"] = 0
    record["runs"]["ewc/seed-1"]["metrics"]["matched"] = [[[0, 0]]] * 6
    assert "for ewc in 3 of 4 seeds. Of 1 of 12 runs the best set" in tables.comparison_table(record)
    assert "| random real images (24 networks) | 25.0 ± 5.1 |" in table
    assert tables.comparison_table(comparison_record(1)).endswith("\n\nOne distillation of each, at equal compute.")
    words = tables.provenance({"toy": record})
    assert words.startswith(
        "- toy: 12 runs, digits, IPC 1, width 8, N = 3, M = 2, window [0, 3), 12.0 minutes on a proc"
    )
    assert words.endswith("threads: 1, PyTorch 2, commit `0123456`.")
    buffer = {"config": {"data": "digits", "epochs": 5}, "experts": [{"test_accuracy": 0.5}]}
    words = tables.provenance({"b": {"buffer": buffer, "result": next(iter(record["runs"].values()))["result"]}})
    assert words.startswith("- b: digits, 5 epochs, test accuracy 50.0 %, 1.0 minutes")


def test_the_benchmark_has_every_cell_with_what_was_measured():
    record, buffers = comparison_record(), [{"buffer": {"config": {"experts": n, "epochs": 3}}} for n in (2, 5)]
    ids = [config_hash(buffer["buffer"]) for buffer in buffers]
    record["config"] |= {"data": "cifar100", "ipc": 10, "iterations": 1096}
    record["buffer_id"] = ids[1]
    config = {"data": "cifar10", "ipc": 1, "width": 128, "student_steps": 50, "buffer_id": ids[0], "network": "convnet"}
    run = {"segments": 1, "config": config, "seconds": [1800.0, 90.0]}
    distil = {"runs": [{**run, "seed": s, "iterations": 70 + s} for s in (0, 1)], "device": "a GPU"}
    tests = [
        {"segments": 1, "seed": s, "iteration": i, "matched": i, "accuracies": [a]}
        for s, i, a in ((0, 50, 0), (0, 70, 0.4), (1, 71, 0.5))
    ]
    (early, *_) = findings.gpu_runs(distil, {"rows": [*tests, {**tests[0], "seed": 1}]}, {1: 50})
    assert early.own == {"synthetic": [0]} and early.config["iterations"] == 50
    studies = {"toy": findings.runs_of(record), "tests/gpu/run.py": findings.gpu_runs(distil, {"rows": tests})}
    runs = tables.benchmark_runs(studies, buffers)
    *_, first, last = tables.markdown(runs).splitlines()
    assert first.startswith(
        "| cifar100 | 10 | 8 | 3 | 5 of 3 epochs | concurrent | 1,096 | 4 | 61.5 ± 1.3 | 0.1 | a pro"
    )
    assert last.startswith("| cifar10 | 1 | 128 | 50 | 2 of 3 epochs | K=1 | 70 to 71 | 2 | 45.0 ± 7.1 | 1.1 | a GPU |")
    speed = {"rows": [{"what": "an expert's epoch", "images": 50_000, "ms": 400.0}]}
    rows = tables.benchmark_table(runs, speed).splitlines()[2:]
    assert len(rows) == sum(len(tables.CELLS[data]) for data in tables.BENCHMARK)
    filled = [row for row in rows if "not run" not in row]
    assert "| cifar10 | 1 | 15.4 | 46.3 |" in filled[0] and "| K=1 45.0 ± 7.1 (width 128, a GPU) |" in filled[0]
    assert "concurrent 61.5 ± 1.3 (width 8, a processor) |" in filled[1] and len(filled) == 2
    config = distill_recipe("datm", "imagenet", 50)
    flops = sum(stage.flops for stage in plan(buffer_of(config), config, measure=False))
    epoch = 3 * 50_000 * 2 * (9 * (3 * 1024 + 128 * 256 + 128 * 64) * 128 + 2048 * 10)  # a network of three blocks
    assert rows[-1].endswith(f"| not run | {flops / epoch * 0.4 / 3600:,.0f} |")


def test_what_a_set_teaches_by_class_and_to_other_networks():
    record = comparison_record(3)
    assert not findings.transfers(record)
    for name, run in record["runs"].items():
        level = 0.5 + 0.1 * name.startswith("concurrent") + 0.02 * run["changes"]["seed"]
        run["evaluations"][0] |= {"network": "convnet", "by_class": {"cat": [level], "dog": [level, level - 0.2]}}
        run["evaluations"].append({"synthetic": [level / 2], "network": "vgg11"})
    assert findings.comparison(record)["test"].max() == pytest.approx(0.62), "of its own architecture alone"
    rows = tables.paired_table("class", findings.by_class(record)).splitlines()
    assert rows[2] == "| cat | 52.0 ± 2.0 | 52.0 ± 2.0 | 62.0 ± 2.0 | +10.0, the same in all | 3 |"
    assert rows[3].startswith("| dog | 42.0 ± 2.0 |") and len(rows) == 4
    (row,) = tables.paired_table("network", findings.transfers(record)).splitlines()[2:]
    assert row.startswith("| vgg11 | 26.0 ± 1.0 |")
    found = [row for row in claims.findings({}, {"toy": record}) if row.claim == "C7"]
    assert found[0].measure == "test accuracy of vgg11, concurrent minus sequential at equal compute"
    assert found[0].verdict == "confirmed" and len(found) == 1
    rows = claims.summary_table(claims.findings({}, {"toy": record, "CIFAR-10, IPC 1": record})).splitlines()[2:]
    ahead = "test accuracy of vgg11, concurrent minus sequential at equal compute: +5.00 points, the same in all, n = 3"
    assert rows[6].startswith(f"| **C7** {claims.CLAIMS['C7']} | {ahead} (CIFAR-10, IPC 1): *confirmed* | 2 | 0 |")
    assert rows[0] == f"| **C1** {claims.CLAIMS['C1']} |  | 0 | 0 | 0 |"


def test_the_best_rates_stand_beside_those_that_were_used():
    accuracies = {"a=1/seed-0": 0.3, "a=1/seed-1": 0.4, "a=2/seed-0": 0.5, "a=2/seed-1": 0.5}
    runs = {
        name: {"result": {"validation_accuracy": accuracy}, "changes": {"a": 2} if "a=2" in name else {}}
        for name, accuracy in accuracies.items()
    }
    search = {"config": {"a": 1, "segments": 4, "window_end": 18}, "runs": runs}
    titles, _, *rows = tables.rates_table([search], {"a": 1}).splitlines()
    assert titles.endswith("| with a=1, % |")
    listed = tables.search_table({"toy": search}).splitlines()[2:]
    assert listed == ["| toy | a=2 | 2 | 50.0 ± 0.0 |", "| toy | a=1 | 2 | 35.0 ± 7.1 |"]
    assert rows == ["| [0, 18) | 4 | 2 | 2 | a=2 | 50.0 ± 0.0 | 35.0 ± 7.1 |"]
