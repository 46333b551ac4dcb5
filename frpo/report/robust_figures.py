"""Figures of the estimators' bias and of the worst case that a trained policy predicts for its own fine-tuning."""

from __future__ import annotations

from math import log

import numpy as np
import pandas as pd

from frpo.report.compare import estimate
from frpo.report.measurements import Measurements, number, sampled_rewards
from frpo.report.robust import GROUPS, decay, predicted_worst_case
from frpo.report.style import Picture, Styles, featured, fit_axis, legend, log_axis, panels, png

MOST_LAMBDAS = 4
USUAL_LAMBDAS = (0.1, 0.3, 1.0)
COLOURS = {"naive": "#b5450b", "jackknife": "#0b2f73"}


def study_lambdas(m: Measurements) -> list[float]:
    """The lambdas of the study, evenly thinned to MOST_LAMBDAS; the usual ones in a study without."""
    own = sorted(m.methods["lambda"].dropna().unique()) if "lambda" in m.methods else []
    own = [float(lam) for lam in own if lam > 0] or list(USUAL_LAMBDAS)
    if len(own) > MOST_LAMBDAS:
        own = [own[round(i)] for i in np.linspace(0, len(own) - 1, MOST_LAMBDAS)]
    return own


def bias_figure(study: pd.DataFrame, prompts: int, samples: int) -> Picture:
    """|bias| of both estimators against the group size, a panel per lambda, log-log."""
    lambdas = list(dict.fromkeys(study["lambda"]))
    slopes = decay(study).set_index(["estimator", "lambda"])["exponent"]
    figure, grid = panels(1, len(lambdas), height=4.8)
    for lam, ax in zip(lambdas, grid[0], strict=True):
        for name, colour in COLOURS.items():
            part = study[study["estimator"].eq(name) & study["lambda"].eq(lam)]
            size, seen = part["bias"].abs(), part["bias"].abs() > 2 * part["error"]
            slope = slopes[(name, lam)]
            ax.plot(part["group"][seen], size[seen], color=colour)
            up = part["bias"] > 0
            ax.plot(part["group"][seen & up], size[seen & up], "^", color=colour)
            ax.plot(part["group"][seen & ~up], size[seen & ~up], "v", color=colour)
            ax.plot(part["group"][~seen], size[~seen], "o", color=colour, mfc="white", alpha=0.6)
            text = f"{name}: slope {slope:.1f}" if np.isfinite(slope) else f"{name}: too small for a slope"
            height = 0.14 if name == "naive" else 0.05
            ax.text(0.04, height, text, color=colour, transform=ax.transAxes, fontsize=11)
        ax.set_xscale("log")
        ax.set_yscale("log")
        low, high = ax.get_ylim()
        ax.set_ylim(low / (high / low) ** 0.35, high)
        log_axis(ax.xaxis, GROUPS)
        log_axis(ax.yaxis)
        ax.set_title(f"lambda {number(lam)}")
        ax.set_xlabel("group size G")
    grid[0][0].set_ylabel("|bias| of log mean exp(-r/lambda), nats")
    caption = (
        f"The samples of each of {prompts} prompts ({samples} each) are taken as the truth, and groups drawn from them "
        "with replacement. Triangles point the way of the bias (down: too low); hollow circles are within two Monte "
        "Carlo standard errors of 0. Expected slopes: -1 naive, -2 or steeper jackknife, once a group holds several of "
        "the completions that dominate; at small lambda it does not."
    )
    return Picture("bias", "Bias of the estimators on the study's rewards", caption, png(figure))


def worst_case_figure(m: Measurements, styles: Styles, primary: str | None) -> Picture | None:
    """Predicted worst-case reward against rho, beside the reward and KL that fine-tuning led to."""
    table = sampled_rewards(m)
    predicted = predicted_worst_case(table) if not table.empty else pd.DataFrame()
    if predicted.empty:
        return None
    shown = featured(m, primary, predicted.index.get_level_values("method"))
    limit = log(table.shape[1])
    figure, grid = panels(1, 1, height=6.4)
    drawn: list[float] = []
    ax, beyond, points = grid[0][0], 0, 0
    for method in shown:
        own, look = predicted.xs(method, level="method"), styles[method]
        bands = [estimate(own[rho]) for rho in own]
        xs = [float(rho) for rho in own]
        ax.plot(xs, [b.mean for b in bands], color=look.colour, linestyle=look.line)
        drawn += [b.mean for b in bands]
        if method in (m.baseline, primary):
            low, high = [b.low for b in bands], [b.high for b in bands]
            ax.fill_between(xs, low, high, color=look.colour, alpha=0.12, linewidth=0)
        measured = measured_drift(m, method)
        drawn += list(measured["reward"])
        ax.plot(measured["kl"], measured["reward"], look.marker, color=look.colour, alpha=0.75)
        ax.plot([], [], color=look.colour, linestyle=look.line, marker=look.marker, label=method)
        beyond, points = beyond + int((measured["kl"] > limit).sum()), points + len(measured)
    ax.axvline(limit, color="#6b7280", linewidth=1, linestyle=":")
    ax.text(limit, 1.0, f" log {table.shape[1]}", color="#4b5563", transform=ax.get_xaxis_transform(), va="top")
    ax.set_xscale("log")
    log_axis(ax.xaxis)
    ax.set_xlabel("KL budget rho, and measured KL to the start, nats per completion")
    ax.set_ylabel("mean reward")
    fit_axis(ax.yaxis, drawn)
    legend(figure, [ax])
    caption = (
        f"Lines: the lowest mean reward of any policy within KL rho of the trained one, on each prompt, from "
        f"{table.shape[1]} samples (which show no budget beyond log {table.shape[1]} = {limit:.2f}), with 95% "
        f"intervals for the baseline and the headline's method."
    )
    if points:
        caption += (
            f" Points: what fine-tuning did, one per downstream run and step, means over seeds, {reward_name(m)}; "
            f"{beyond} of {points} lie beyond the predictable budgets. Fine-tuning drifts for its own task and not "
            "against the reward, so its points lie above their line, unless it spends its KL on the prompts that lose "
            "most."
        )
    return Picture("worst_case", "Worst-case reward: predicted and measured", caption, png(figure))


def reward_name(m: Measurements) -> str:
    """The reward of the measured points: the sampled one where fine-tuning measured it, else the role ``reward``."""
    return str(m.roles.get("reward") if m.after(m.roles.get("sampled")).empty else m.roles.get("sampled"))


def measured_drift(m: Measurements, method: str) -> pd.DataFrame:
    """Means over seeds of ``kl`` (to the start) and ``reward`` at each downstream run and step > 0."""
    columns = {"kl": m.after(m.roles.get("kl_start")), "reward": m.after(reward_name(m))}
    known = {
        name: table.xs(method, level="method").mean()
        for name, table in columns.items()
        if not table.empty and method in table.index.get_level_values("method")
    }
    points = pd.DataFrame(known, columns=["kl", "reward"], dtype=float).dropna()
    if points.empty:
        return points
    return points[(points.index.get_level_values("step") > 0) & (points["kl"] > 0)]
