"""Verdicts on the paper's claims, computed from the studies' records.

A verdict is mechanical. Each claim is written as an effect that the paper expects to be positive, measured once a
replicate (its own expert or seed). If the 95 % confidence interval of the mean (Student's t over replicates) lies
above zero the claim is *confirmed* in that setting, below zero *contradicted*, and else it is *not settled*.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import pandas as pd
from jaxtyping import Float

from cddbook import correlation
from cddbook.findings import (
    Correlations,
    Effect,
    Record,
    at_equal_iterations,
    comparison,
    correlations,
    curves,
    effect,
    paired,
)
from cddbook.records import read_record
from cddbook.tables import markdown

Verdict = Literal["confirmed", "contradicted", "not settled", "not tested"]

CORRELATION_STUDIES = {
    "digits, IPC 1": "correlation-digits-ipc1",
    "CIFAR-10, IPC 1": "correlation-cifar10-ipc1",
    "CIFAR-10, IPC 10": "correlation-cifar10-ipc10",
    "CIFAR-10, IPC 50": "correlation-cifar10-ipc50",
}
"""Committed records of correlation studies by the name of their setting; `book/record.sh` makes them."""

SEGMENT_STUDIES = {
    "CIFAR-10, IPC 1": "segments-cifar10-ipc1",
    "CIFAR-10, IPC 10": "segments-cifar10-ipc10",
    "CIFAR-10, IPC 50": "segments-cifar10-ipc50",
}
"""Committed records of comparisons of segment counts."""

REMEDY_STUDIES = {"digits, IPC 1": "remedies-digits-ipc1"}
"""Committed records of comparisons of remedies."""

CLAIMS = {
    "C1": "Matching some segments is negatively correlated with matching others.",
    "C2": "With few images per class the negative pairs lie below the diagonal, with many above it.",
    "C3": "Matching one segment at a time raises the others' losses: it forgets.",
    "C4": "This raises the accumulated trajectory error.",
    "C5": "Concurrent matching makes correlations positive, does not forget, and helps more than EWC and SI.",
    "C6": "Concurrent matching gives better accuracy.",
    "C7": "It transfers better to other architectures, and is lossless at 20 % of CIFAR.",
    "C8": "It needs no more memory; an iteration takes longer in proportion to K.",
}
"""The paper's claims, as its abstract and public reviews report them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """What one measure says about one claim in one setting."""

    claim: str
    setting: str
    measure: str
    effect: str
    verdict: Verdict


def verdict(found: Effect) -> Verdict:
    """Of the claim that the effect is positive."""
    if found.low > 0:
        return "confirmed"
    return "contradicted" if found.high < 0 else "not settled"


def _finding(claim: str, setting: str, measure: str, found: Effect, unit: str = "") -> Finding:
    """A measure with its interval; one with a unit is shown times 100."""
    low, mean, high = ((100 if unit else 1) * value for value in (found.low, found.mean, found.high))
    interval = f" [{low:+.2f}, {high:+.2f}]" if found.count > 1 else ""
    shown = f"{mean:+.2f}{unit}{interval}, n = {found.count}"
    return Finding(claim=claim, setting=setting, measure=measure, effect=shown, verdict=verdict(found))


def _of_correlation(setting: str, study: Correlations, ipc: int) -> list[Finding]:
    """What a correlation study says about C1, C2, C3 and C5."""
    losses, changes = study.pearson(), study.pearson(changes=True)
    pairs = [
        _of_pairs(setting, "losses correlate negatively (t test, Holm)", losses, study.p_values_of_losses()),
        _of_pairs(setting, "changes correlate negatively (permutation test, Holm)", changes, study.p_values()),
    ]
    rows = []
    if ipc in (1, 50):
        side, sign = ("below minus above", 1) if ipc == 1 else ("above minus below", -1)
        measure = f"share of pairs whose losses correlate negatively, {side} the diagonal"
        shares = [correlation.negative_shares(matrix) for matrix in losses]
        rows.append(("C2", measure, effect([sign * (below - above) for below, above in shares]), ""))
    others = [float(correlation.off_diagonal(matrix).mean()) for matrix in study.net_change()]
    measure = "the others' losses against the start, after matching one alone"
    rows.append(("C3", measure, effect(others), " %"))
    extra = [float(correlation.off_diagonal(matrix).mean() - np.diagonal(matrix).mean()) for matrix in study.rise()]
    measure = "rise of a loss above its lowest value, of the others minus of the one matched"
    rows.append(("C3", measure, effect(extra), " %"))
    for of_changes, what in ((False, "losses"), (True, "changes")):
        matrices = [study.pearson_in(control, changes=of_changes) for control in ("sequential", "concurrent")]
        sequential, concurrent = (
            np.array([(correlation.off_diagonal(m) < 0).mean() for m in repeated]) for repeated in matrices
        )
        measure = (
            f"share of pairs whose {what} correlate negatively within a run: sequential ({sequential.mean():.0%}) "
            f"minus concurrent ({concurrent.mean():.0%})"
        )
        rows.append(("C5", measure, effect(sequential - concurrent), ""))
    return pairs + [_finding(claim, setting, measure, found, unit) for claim, measure, found, unit in rows]


def _of_images(studies: Mapping[str, tuple[int, Correlations]]) -> list[Finding]:
    """C2 over the studies of one data set: negative pairs above the diagonal with most and with fewest images."""
    found = []
    for data in dict.fromkeys(setting.split(",")[0] for setting in studies):
        same = sorted(
            (ipc, [correlation.negative_shares(matrix)[1] for matrix in study.pearson()])
            for setting, (ipc, study) in studies.items()
            if setting.split(",")[0] == data
        )
        (least, few), (most, many) = same[0], same[-1]
        if least < most:
            measure = f"share of negative pairs above the diagonal (losses), IPC {most} minus IPC {least}"
            found.append(_finding("C2", data, measure, effect(np.asarray(many) - np.asarray(few))))
    return found


def _of_pairs(
    setting: str, measure: str, matrices: Float[np.ndarray, "replicates p p"], p_values: Float[np.ndarray, "p p"]
) -> Finding:
    """C1: confirmed if any pair is negative beyond chance, contradicted if every pair is positive beyond chance."""
    pairs = correlation.off_diagonal(p_values)
    mean = correlation.off_diagonal(matrices.mean(axis=0))
    positive = correlation.holm(correlation.t_test(np.array([correlation.off_diagonal(-m) for m in matrices])))
    return Finding(
        claim="C1",
        setting=setting,
        measure=f"pairs whose {measure}",
        effect=f"{(pairs < 0.05).sum()} of {len(pairs)}; mean correlation {mean.min():+.2f} to {mean.max():+.2f}",
        verdict="confirmed" if (pairs < 0.05).any() else "contradicted" if (positive < 0.05).all() else "not settled",
    )


def _of_comparison(setting: str, record: Record, concurrent: str, sequential: str) -> list[Finding]:
    """What a comparison says about C3, C4, C5 and C6."""
    table = comparison(record)
    between = effect(table[table["variant"] == sequential]["between"].dropna().tolist())
    less = f"{sequential} minus {concurrent} at equal compute"
    error, forgetting = (paired(table, column, sequential, concurrent) for column in ("error", "forgetting"))
    rows = [
        ("C3", "change of a segment's loss between two visits under ordinary sampling", between, " %"),
        ("C4", f"accumulated error, {less}, relative to the expert's way", error, " %"),
        ("C5", f"average forgetting, {less}", forgetting, " % of a loss of 1"),
    ]
    for remedy in sorted({"ewc", "si"} & set(table["variant"])):
        measure = f"test accuracy, {concurrent} minus {remedy.upper()} at equal compute"
        rows.append(("C5", measure, paired(table, "test", concurrent, remedy), " points"))
    iteration, ahead = at_equal_iterations(curves(record), concurrent, sequential)
    if iteration > 0:
        measure = f"validation accuracy, {concurrent} minus {sequential} after {iteration} iterations each"
        rows.append(("C6", measure, ahead, " points"))
    measure = f"test accuracy, {concurrent} minus {sequential} at equal compute"
    rows.append(("C6", measure, paired(table, "test", concurrent, sequential), " points"))
    return [_finding(claim, setting, measure, found, unit) for claim, measure, found, unit in rows]


def _of_memory(record: Record) -> Finding:
    """C8: memory of the largest K above the process's own, over that of K = 1; confirmed if it is below 1.1."""
    table = pd.DataFrame(record["measurements"]).query("implementation == 'cddlib, K segments'")
    groups = dict(iter(table.assign(above=table["peak_mb"] - table["start_mb"]).groupby("segments")))
    least, most = min(groups), max(groups)
    ratios = groups[most]["above"] / groups[least]["above"].mean()
    ratio, time = effect(ratios), groups[most]["seconds"].mean() / groups[least]["seconds"].mean()
    return Finding(
        claim="C8",
        setting=f"{record['device']}, width {record['config']['width']}",
        measure=f"memory of K = {most} over that of K = {least} (claim: below 1.1); time likewise",
        effect=f"{ratio.mean:.2f} [{ratio.low:.2f}, {ratio.high:.2f}], n = {ratio.count}; time {time:.1f}",
        verdict=verdict(effect(1.1 - ratios)),
    )


def findings(
    correlation_records: Mapping[str, Record], comparison_records: Mapping[str, Record], memory: Record | None = None
) -> list[Finding]:
    """Everything that the records say about the claims, in the claims' order.

    Args:
        correlation_records: correlation studies by the name of their setting.
        comparison_records: comparisons by the name of their setting.
        memory: the record of `tests/benchmarks/memory.py`; without it nothing is said of C7 and C8.
    """
    studies = {
        setting: (record["config"]["ipc"], correlations(record)) for setting, record in correlation_records.items()
    }
    found = [finding for setting, (ipc, study) in studies.items() for finding in _of_correlation(setting, study, ipc)]
    found += _of_images(studies)
    for setting, record in comparison_records.items():
        names = ("K=4", "K=1") if any(name.startswith("K=4/") for name in record["runs"]) else None
        found += _of_comparison(setting, record, *(names or ("concurrent", "sequential")))
    if memory is not None:
        needed = "needs other architectures and sets of 1,000 images a class"
        found.append(Finding(claim="C7", setting="", measure=needed, effect="", verdict="not tested"))
        found.append(_of_memory(memory))
    return sorted(found, key=lambda finding: finding.claim)


def committed_findings() -> list[Finding]:
    """`findings` of the records that are committed with the book; needs the repository around."""
    read = {name: read_record(record) for name, record in {**SEGMENT_STUDIES, **REMEDY_STUDIES}.items()}
    correlated = {name: read_record(record) for name, record in CORRELATION_STUDIES.items()}
    return findings(correlated, read, read_record("memory"))


def claims_table(found: Sequence[Finding], claims: Sequence[str] = tuple(CLAIMS)) -> str:
    """Markdown: each of `claims` in a sentence, and below it a row a finding."""
    rows = []
    for claim in claims:
        rows.append((f"**{claim}**", "", f"**{CLAIMS[claim]}**", "", ""))
        rows += [("", f.setting, f.measure, f.effect, f"**{f.verdict}**") for f in found if f.claim == claim]
    titles = ["claim", "setting", "measure", "effect [95 % interval]", "verdict"]
    return markdown(pd.DataFrame(rows, columns=titles))
