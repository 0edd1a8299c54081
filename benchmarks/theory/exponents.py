"""How error falls with cost for EM and ML-EM on an analytic ladder, beside what the theory predicts.

python benchmarks/theory/exponents.py --out benchmarks/results/theory

writes theory.json and theory.png and prints the tables; docs/theory.md explains them.
"""

import json
import os
import platform
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from math import factorial
from pathlib import Path
from typing import Any

import click
import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from analytic import Replicas, expected_cost, level_cost, sample, theory_probabilities
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

GAMMAS = (1.5, 2.0, 2.5, 4.0)
BATCH = 250
BOOTSTRAP = 1000

EM_LEVELS = range(2, 12)
EM_RATIOS = (1 / 4, 1 / 2, 1, 2, 4, 8)
"""Steps over 2^level: about 1 is best on this ladder."""
EM_FITTED = range(3, 11)
"""Without the ends of EM_LEVELS, where the best level for a budget may lie outside the grid."""

ACCURACIES = range(5, 12)
"""n: the error aimed at is proportional to 2^-n, the best level is n, and there are FINENESS * 2^n steps."""
FINENESS = 16
SPREAD = 4.0
"""Variance of the coins in units of 4^-n, the squared error of the best level. The cost of an error is least at
2 / (gamma - 2): 4 for gamma = 2.5, 1 for gamma = 4."""

FIXED = 8
"""n of the runs in which only the number of steps changes."""
FIXED_STEPS = tuple(2**j for j in range(5, 15))
PLATEAU = 2**10
"""From this number of steps on, the error of the steps does not matter to the runs with n = FIXED."""
POISSON_GAMMA, POISSON_ACCURACY = 2.5, 6
POISSON_STEPS = tuple(2**j for j in range(3, 15))


@dataclass(frozen=True, eq=False)
class Run:
    """One configuration: probabilities p (n,) of levels 1 ... n, and the number of steps."""

    experiment: str
    gamma: float | None
    steps: int
    p: np.ndarray

    @property
    def levels(self) -> int:
        return len(self.p)


def design() -> list[Run]:
    """All runs. EM does not depend on gamma: its error is measured once, and costed for each gamma."""
    runs = [Run("em", None, int(ratio * 2**level), np.ones(level)) for level in EM_LEVELS for ratio in EM_RATIOS]
    for gamma in GAMMAS:
        for n in ACCURACIES:
            steps = FINENESS * 2**n
            runs.append(Run("accuracy", gamma, steps, theory_probabilities(gamma, n, steps, SPREAD * 0.25**n)))
        for steps in FIXED_STEPS:
            p = theory_probabilities(gamma, FIXED, steps, SPREAD * 0.25**FIXED)
            runs.append(Run("steps", gamma, steps, p))
    n, finest = POISSON_ACCURACY, POISSON_STEPS[-1]
    rate = theory_probabilities(POISSON_GAMMA, n, finest, SPREAD * 0.25**n) * finest
    rule = rate[-1] * 0.5 ** ((1 + POISSON_GAMMA / 2) * (np.arange(1, n + 1) - n))
    for steps in POISSON_STEPS:
        p = np.minimum(1.0, rule / steps)
        p[0] = 1.0
        runs.append(Run("poisson", POISSON_GAMMA, steps, p))
    return runs


def measure(runs: Sequence[Run], seed: int, batch: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Squared errors (BATCH,) and calls (levels, BATCH) of each run, on the same replicas."""
    rng = np.random.default_rng([seed, batch])
    levels, finest = max(run.levels for run in runs), max(run.steps for run in runs)
    replicas = Replicas(BATCH, levels, finest, rng)
    return [sample(replicas, run.p, run.steps, rng) for run in runs]


class Measured:
    """A run's replicas: their mean and its bootstrap, for the error and for the cost at a gamma."""

    def __init__(self, run: Run, squared_error: np.ndarray, calls: np.ndarray, resampled: np.ndarray) -> None:
        self.run = run
        self.calls = calls
        self.resampled = resampled
        self.error = np.sqrt(resampled @ squared_error)

    def cost(self, gamma: float) -> np.ndarray:
        return self.resampled @ (level_cost(gamma, self.run.levels) @ self.calls)


def resampling(count: int, rng: np.random.Generator) -> np.ndarray:
    """Weights of replicas, (1 + BOOTSTRAP, count): all replicas alike first, then with replacement."""
    drawn = rng.multinomial(count, np.full(count, 1 / count), size=BOOTSTRAP)
    return np.vstack([np.ones(count), drawn]) / count


def slope(cost: np.ndarray, error: np.ndarray) -> float:
    """The exponent of error in cost, by least squares on logarithms."""
    return float(np.polyfit(np.log(cost), np.log(error), 1)[0])


def interval(values: np.ndarray) -> dict[str, Any]:
    """The value (first) and the middle 95 % of its bootstrap (the rest)."""
    return {"value": float(values[0]), "interval": np.quantile(values[1:], [0.025, 0.975]).tolist()}


def front(cost: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Indices, by cost, of the points that no cheaper point beats: the best choice for each budget."""
    order = np.argsort(cost, kind="stable")
    best = np.minimum.accumulate(np.append(np.inf, error[order]))
    return order[error[order] < best[:-1]]


def em_exponent(measured: Sequence[Measured], gamma: float) -> tuple[np.ndarray, np.ndarray]:
    """Exponents over the bootstrap, each with its own choice of the best level; and the indices fitted first."""
    level = np.array([one.run.levels for one in measured])
    cost = np.array([one.cost(gamma)[0] for one in measured])
    errors = np.array([one.error for one in measured])

    def fitted(error: np.ndarray) -> np.ndarray:
        chosen = front(cost, error)
        return chosen[np.isin(level[chosen], EM_FITTED)]

    choices = [fitted(error) for error in errors.T]
    slopes = [slope(cost[chosen], error[chosen]) for chosen, error in zip(choices, errors.T, strict=True)]
    return np.array(slopes), choices[0]


def slopes(costs: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """Exponents over the bootstrap, for costs and errors (points, 1 + BOOTSTRAP)."""
    return np.array([slope(cost, error) for cost, error in zip(costs.T, errors.T, strict=True)])


def open_levels(run: Run, gamma: float) -> float:
    """How many levels have p_k < 1, as the real number at which the rule crosses 1."""
    return float(-np.log2(run.p[-1]) / (1 + gamma / 2))


def exponent(fitted: np.ndarray, here: float, limit: float) -> dict[str, Any]:
    """Exponents over the bootstrap, beside the predictions for the fitted accuracies and in the limit of small errors.

    Deviations are relative: fitted over predicted, less 1.
    """
    return {
        "exponent": interval(fitted),
        "predicted_over_this_range": here,
        "deviation": interval(fitted / here - 1),
        "predicted_in_the_limit": limit,
        "deviation_from_the_limit": interval(fitted / limit - 1),
    }


def analyse_exponents(em: Sequence[Measured], ml: Sequence[Measured], gamma: float) -> dict[str, Any]:
    em_slopes, chosen = em_exponent(em, gamma)
    cost, error = np.array([one.cost(gamma) for one in ml]), np.array([one.error for one in ml])
    formula = np.array([expected_cost(gamma, one.run.p, one.run.steps) for one in ml])
    accuracy = np.array([0.5**one.run.levels for one in ml])
    result = {
        "gamma": gamma,
        "em": {
            # N in proportion to 2^level at a cost of N 2^(gamma level): a power law at any accuracy.
            **exponent(em_slopes, -1 / (gamma + 1), -1 / (gamma + 1)),
            "points": [
                {"level": one.run.levels, "steps": one.run.steps, "cost": one.cost(gamma)[0], **error_of(one)}
                for one in (em[i] for i in chosen)
            ],
        },
        "mlem": {
            **exponent(slopes(cost, error), slope(formula, accuracy), -1 / max(gamma, 1 + gamma / 2)),
            "points": [
                {"levels": one.run.levels, "steps": one.run.steps, "p": one.run.p.tolist(), "cost": one.cost(gamma)[0]}
                | {"expected_cost": expected, **error_of(one)}
                for one, expected in zip(ml, formula, strict=True)
            ],
        },
    }
    if gamma == 2:
        logarithm = np.array([open_levels(one.run, gamma) for one in ml])
        result["mlem"]["exponent_without_log_squared"] = interval(slopes(cost / logarithm[:, None] ** 2, error))
    return result


def error_of(one: Measured) -> dict[str, float]:
    return {"error": one.error[0], "error_standard_error": one.error[1:].std()}


def em_cost(exponents: dict[str, Any], error: float) -> float | None:
    """What EM pays for an error, along its best points; None outside them."""
    errors, costs = ([point[key] for point in exponents["em"]["points"]][::-1] for key in ("error", "cost"))
    if not errors[0] <= error <= errors[-1]:
        return None
    return float(np.exp(np.interp(np.log(error), np.log(errors), np.log(costs))))


def analyse_steps(ml: Sequence[Measured], gamma: float) -> dict[str, Any]:
    cost = np.array([one.cost(gamma) for one in ml])
    formula = np.array([expected_cost(gamma, one.run.p, one.run.steps) for one in ml])
    steps = np.array([one.run.steps for one in ml])
    flat = steps >= PLATEAU
    error = np.array([one.error for one in ml])
    return {
        "gamma": gamma,
        "exponent_of_cost_in_steps": interval(slopes(np.tile(steps[flat, None], cost.shape[1]), cost[flat])),
        "predicted_over_this_range": slope(steps[flat], formula[flat]),
        "predicted_in_the_limit": max(0.0, 1 - gamma / 2),
        "error_finest_over_first": interval(error[-1] / error[flat][0]),
        "points": [
            {"steps": one.run.steps, "p": one.run.p.tolist(), "cost": one.cost(gamma)[0]}
            | {"expected_cost": expected, **error_of(one)}
            for one, expected in zip(ml, formula, strict=True)
        ],
    }


def poisson(rate: float, size: int) -> np.ndarray:
    """P(0), ..., P(size - 1) of the Poisson distribution."""
    return np.array([np.exp(-rate) * rate**count / factorial(count) for count in range(size)])


def distance_to_poisson(counts: np.ndarray, rate: float) -> float:
    """Total variation between the distribution of the counts and Poisson(rate)."""
    seen = np.bincount(counts) / len(counts)
    law = poisson(rate, len(seen))
    return float((np.abs(seen - law).sum() + 1 - law.sum()) / 2)


def analyse_poisson(ml: Sequence[Measured], rng: np.random.Generator) -> dict[str, Any]:
    rate = ml[-1].run.p[-1] * ml[-1].run.steps
    size = ml[-1].calls.shape[1]
    genuine = [distance_to_poisson(rng.poisson(rate, size), rate) for _ in range(BOOTSTRAP)]
    points = []
    for one in ml:
        # The best level is called where its own coin fires.
        counts = one.calls[-1]
        mean = one.resampled @ counts
        spread = one.resampled @ counts**2 - mean**2
        points.append(
            {"steps": one.run.steps, "p": one.run.p[-1], "mean": mean[0], "variance_over_mean": interval(spread / mean)}
            | {"distance_to_poisson": distance_to_poisson(counts, rate), "counts": np.bincount(counts).tolist()}
            | error_of(one)
        )
    return {
        "gamma": POISSON_GAMMA,
        "level": POISSON_ACCURACY,
        "rate": rate,
        "distance_of_genuine_poisson": {"median": float(np.median(genuine)), "95 %": float(np.quantile(genuine, 0.95))},
        "points": points,
    }


def panel_exponents(axes: Axes, result: dict[str, Any], em: Sequence[dict[str, Any]]) -> None:
    gamma = result["gamma"]
    cloud = np.array([(one["steps"] * 2 ** (gamma * one["level"]), one["error"]) for one in em]).T
    axes.loglog(*cloud, ".", color="0.8", markersize=4, zorder=0, label="EM, any level and steps")
    for key, name, colour, marker in (("em", "EM, best", "C0", "o"), ("mlem", "ML-EM", "C3", "s")):
        one = result[key]
        cost, error = (np.array([point[what] for point in one["points"]]) for what in ("cost", "error"))
        middle = np.exp(np.log(cost).mean()), np.exp(np.log(error).mean())
        ends = cost[[0, -1]] * [0.5, 2]
        fitted, predicted = one["exponent"]["value"], one["predicted_over_this_range"]
        axes.loglog(cost, error, marker, color=colour, markersize=5)
        line = middle[1] * (ends / middle[0]) ** fitted
        axes.loglog(ends, line, marker + "-", markevery=[], color=colour, label=f"{name}: fitted {fitted:.3f}")
        line = middle[1] * (ends / middle[0]) ** predicted
        axes.loglog(ends, line, "--", color="k", linewidth=1, label=f"predicted {predicted:.3f}")
    regime = "HTMC" if gamma > 2 else "border of HTMC" if gamma == 2 else "below HTMC"
    axes.set(title=rf"$\gamma$ = {gamma:g} ({regime})", xlabel="nominal cost per sample", ylim=(5e-4, 1))
    axes.legend(fontsize=9, loc="upper right")


def panel_steps(cost: Axes, error: Axes, results: Sequence[dict[str, Any]]) -> None:
    for number, result in enumerate(results):
        gamma, points = result["gamma"], result["points"]
        steps, costs, expected, errors = (
            np.array([point[key] for point in points]) for key in ("steps", "cost", "expected_cost", "error")
        )
        unit = 2 ** (gamma * FIXED)
        label = rf"$\gamma$ = {gamma:g}"
        cost.loglog(steps, costs / unit, "o", color=f"C{number}", markersize=5, label=label)
        cost.loglog(steps, expected / unit, "--", color=f"C{number}", linewidth=1)
        error.loglog(steps, errors, "o-", color=f"C{number}", markersize=4, label=label)
    steps = np.array([2**5, 2**10])
    cost.loglog(steps, steps, ":", color="k", label="EM with the best level")
    cost.set(title="Cost against steps, same accuracy", xlabel="steps N", ylabel="cost / cost of one best-level call")
    cost.legend(fontsize=8, title="points: measured, dashes: formula", title_fontsize=8, loc="upper right")
    cost.set_ylim(2, 2e4)
    error.set(title="Error of the same runs", xlabel="steps N", ylabel="strong L² error", ylim=(5e-3, 5e-2))
    error.legend(fontsize=8)


def panel_poisson(axes: Axes, spread: Axes, result: dict[str, Any]) -> None:
    rate, points = result["rate"], result["points"]
    size = max(len(point["counts"]) for point in points) + 1
    for offset, number, colour in ((-0.2, 0, "C1"), (0.2, -1, "C0")):
        point = points[number]
        counts = np.array(point["counts"])
        label = f"N = {point['steps']:,}"
        axes.bar(np.arange(len(counts)) + offset, counts / counts.sum(), 0.4, color=colour, label=label)
    axes.plot(np.arange(size), poisson(rate, size), "k.-", linewidth=1, label=f"Poisson({rate:.2f})")
    axes.set(
        title=rf"Calls of the best level, $\gamma$ = {result['gamma']:g}",
        xlabel="calls in a trajectory",
        ylabel="share",
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize=8)
    steps = [point["steps"] for point in points]
    ratio = [point["variance_over_mean"] for point in points]
    value = np.array([one["value"] for one in ratio])
    bars = np.abs(np.array([one["interval"] for one in ratio]).T - value)
    spread.errorbar(steps, value, bars, fmt="o", color="C0", markersize=4, label="variance / mean of the calls")
    spread.plot(steps, [1 - point["p"] for point in points], "k--", linewidth=1, label="1 - p; 1 is Poisson")
    error = np.array([point["error"] for point in points])
    spread.plot(steps, error / error[-1], "s-", color="C3", markersize=4, label="error / error at the last N")
    spread.set(title="Poisson limit of the same runs", xlabel="steps N", xscale="log", ylim=(0, None))
    spread.legend(fontsize=8)


def figure(report: dict[str, Any], path: Path) -> None:
    canvas, axes = plt.subplots(2, 4, figsize=(17, 8.5), layout="constrained")
    for one, result in zip(axes[0], report["exponents"], strict=True):
        panel_exponents(one, result, report["em"])
    axes[0, 0].set_ylabel("strong L² error")
    panel_steps(*axes[1, :2], report["steps"])
    panel_poisson(*axes[1, 2:], report["poisson"])
    for one in axes.flat:
        one.grid(alpha=0.25)
    canvas.savefig(path, dpi=110)


def show(report: dict[str, Any]) -> None:
    """The tables, in Markdown."""

    def text(value: dict[str, Any]) -> str:
        low, high = value["interval"]
        return f"{value['value']:.3f} [{low:.3f}, {high:.3f}]"

    def percent(value: dict[str, Any]) -> str:
        low, high = value["interval"]
        return f"{value['value']:+.1%} [{low:+.1%}, {high:+.1%}]"

    print(
        "\n| gamma | method | fitted exponent [95 %] | predicted over this range | deviation [95 %] | limit | from it |"
    )
    print("|---|---|---|---|---|---|---|")
    for result in report["exponents"]:
        for key, name in (("em", "EM"), ("mlem", "ML-EM")):
            one = result[key]
            row = (f"{result['gamma']:g}", name, text(one["exponent"]), f"{one['predicted_over_this_range']:.3f}")
            row += (percent(one["deviation"]), f"{one['predicted_in_the_limit']:.3f}")
            print("|", " | ".join(row), f"| {one['deviation_from_the_limit']['value']:+.1%} |")
        if "exponent_without_log_squared" in one:
            corrected, limit = one["exponent_without_log_squared"], one["predicted_in_the_limit"]
            row = ("2", "ML-EM, cost / log²", text(corrected), "", "", f"{limit:.3f}")
            print("|", " | ".join(row), f"| {corrected['value'] / limit - 1:+.1%} |")
    print("\nEM's cost for the same error over ML-EM's, by accuracy (coarse to fine), and at n = 8 by steps:")
    for exponents, steps in zip(report["exponents"], report["steps"], strict=True):
        both = exponents["mlem"]["points"], steps["points"]
        rows = ([p["em_cost"] / p["cost"] if p["em_cost"] else np.nan for p in points] for points in both)
        print(f"gamma = {exponents['gamma']:g}:", " | ".join(" ".join(f"{one:.2f}" for one in row) for row in rows))
    print(f"\n| gamma | exponent of cost in N, N >= {PLATEAU} [95 %] | formula | limit | error, last / first [95 %] |")
    print("|---|---|---|---|---|")
    for one in report["steps"]:
        row = (f"{one['gamma']:g}", text(one["exponent_of_cost_in_steps"]), f"{one['predicted_over_this_range']:.3f}")
        row += (f"{one['predicted_in_the_limit']:g}", text(one["error_finest_over_first"]))
        print("|", " | ".join(row), "|")
    one = report["poisson"]
    print(f"\nrate {one['rate']:.3f}, distance of genuine Poisson counts {one['distance_of_genuine_poisson']}")
    print("| N | mean calls | variance / mean [95 %] | 1 - p | distance to Poisson | error |")
    print("|---|---|---|---|---|---|")
    for point in one["points"]:
        row = (f"{point['steps']}", f"{point['mean']:.2f}", text(point["variance_over_mean"]), f"{1 - point['p']:.3f}")
        row += (f"{point['distance_to_poisson']:.3f}", f"{point['error']:.4f}")
        print("|", " | ".join(row), "|")


@click.command()
@click.option("--batches", default=4, help=f"Batches of {BATCH} replicas.")
@click.option("--seed", default=0)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Path of the results, without suffix.")
def main(batches: int, seed: int, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    runs = design()
    workers = min(batches, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers) as pool:
        results = list(pool.map(partial(measure, runs, seed), range(batches)))
    seconds, used = time.monotonic() - start, os.times()
    rng = np.random.default_rng([seed, batches])
    resampled = resampling(batches * BATCH, rng)
    measured = [
        Measured(run, np.concatenate([e for e, _ in parts]), np.concatenate([c for _, c in parts], axis=1), resampled)
        for run, parts in zip(runs, zip(*results, strict=True), strict=True)
    ]

    def select(experiment: str, gamma: float | None) -> list[Measured]:
        return [one for one in measured if one.run.experiment == experiment and one.run.gamma == gamma]

    em = select("em", None)
    report: dict[str, Any] = {
        "machine": f"{platform.machine()}, {workers} cores",
        "seconds": round(seconds, 1),
        "processor_seconds": round(used.children_user + used.children_system, 1),
        "replicas": batches * BATCH,
        "seed": seed,
        "exponents": [analyse_exponents(em, select("accuracy", gamma), gamma) for gamma in GAMMAS],
        "steps": [analyse_steps(select("steps", gamma), gamma) for gamma in GAMMAS],
        "poisson": analyse_poisson(select("poisson", POISSON_GAMMA), rng),
        "em": [{"level": one.run.levels, "steps": one.run.steps, **error_of(one)} for one in em],
    }
    for exponents, steps in zip(report["exponents"], report["steps"], strict=True):
        for point in exponents["mlem"]["points"] + steps["points"]:
            point["em_cost"] = em_cost(exponents, point["error"])
    out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    figure(report, out.with_suffix(".png"))
    show(report)


if __name__ == "__main__":
    main()
