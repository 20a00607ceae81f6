"""What the demo shows at its end: tables, a plot and a sample of text."""

import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table

PROMPT = "\n\nKING.\n"
SAMPLE_TOKENS = 240

Losses = dict[int, dict[str, float]]
"""Held-out loss in nats a byte, by round (0: the initial model), then by site and "overall"."""


def losses(shown: dict[str, Any]) -> Losses:
    """Held-out losses from what `fedloom run show --json` prints.

    A model is measured by itself, or by those who train from it, in whose round that then stands.
    """
    measured = {entry["number"]: entry["metrics"] for entry in shown["rounds"] if "loss" in entry["metrics"]}
    found: Losses = {number: {} for number in measured}
    for entry in shown["rounds"]:
        for site in entry["sites"]:
            before = site.get("before", {}).get("metrics", {})
            if "loss" in before and site["before_round"] in found:
                found[site["before_round"]][site["site"]] = before["loss"]
            if site["work"] == "evaluate" and site["state"] == "done":
                found[entry["number"]][site["site"]] = site["metrics"]["loss"]
    return {
        number: dict(sorted(by_site.items())) | {"overall": measured[number]["loss"]}
        for number, by_site in found.items()
    }


def print_report(console: Console, content: dict[str, Any]) -> None:
    """The loss table, the cost table, and the samples."""
    console.print("", _loss_table(losses(content["run"]), content["alone"]), "")
    console.print(_cost_table(content["run"]))
    for when, text in content["samples"].items():
        console.print(
            Panel(text, title=f"Text that the model writes, {when} training", width=88), markup=False
        )


def _loss_table(by_round: Losses, alone: dict[str, dict[str, float]]) -> Table:
    last = max(by_round)
    table = Table(title=f"Loss (nats a byte) and perplexity on held-out text, before and after {last} rounds")
    for heading in ("Held-out text of", "Start", "Together"):
        table.add_column(heading, justify="left" if heading.startswith("Held") else "right")
    for site in alone:
        table.add_column(f"{site} alone", justify="right")
    for name in by_round[last]:
        cells = [
            by_round[0].get(name),
            by_round[last][name],
            *(measured[name] for measured in alone.values()),
        ]
        table.add_row(name, *(_with_perplexity(loss) for loss in cells), end_section=name == "overall")
    return table


def _with_perplexity(loss: float | None) -> str:
    return "" if loss is None else f"{loss:.3f} ({math.exp(loss):.2f})"


def _cost_table(shown: dict[str, Any]) -> Table:
    table = Table(title="What it cost, by site")
    for heading in ("Site", "Examples", "Received", "Sent", "Seconds by phase"):
        table.add_column(heading, justify="left" if heading in ("Site", "Seconds by phase") else "right")
    work = [site for entry in shown["rounds"] for site in entry["sites"]]
    for name in sorted({site["site"] for site in work}):
        mine = [site for site in work if site["site"] == name]
        phases: dict[str, float] = {}
        for site in mine:
            for phase, seconds in site["phase_seconds"].items():
                phases[phase] = phases.get(phase, 0.0) + seconds
        spent = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in phases.items() if seconds >= 0.05)
        examples = sum(site["examples"] for site in mine if site["work"] == "train")
        received, sent = (sum(site[way] for site in mine) for way in ("bytes_down", "bytes_up"))
        table.add_row(name, f"{examples:,}", f"{received / 1e6:.1f} MB", f"{sent / 1e6:.1f} MB", spent)
    return table


def save_plot(by_round: Losses, path: Path) -> None:
    """Loss by round, of each site and overall, as PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    rounds = sorted(by_round)
    for name in by_round[rounds[-1]]:
        overall = name == "overall"
        axes.plot(
            rounds,
            [by_round[number].get(name, math.nan) for number in rounds],
            label=name, marker="o", markersize=4,
            color="lightgrey" if overall else None, linewidth=6 if overall else 1.2,
            zorder=1 if overall else 2,
        )  # fmt: skip
    axes.set(xlabel="Round", ylabel="Held-out loss (nats a byte)", title="One GPT, trained by three sites")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def sample(model_folder: Path) -> str:
    """Text that an exported model writes after a prompt, the same each time."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    prompt = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    context = model.config.max_position_embeddings
    tokens = prompt
    with torch.inference_mode():
        for _ in range(SAMPLE_TOKENS):
            logits = model(tokens[:, -context:]).logits[0, -1] / 0.8
            tokens = torch.cat([tokens, torch.multinomial(logits.softmax(-1), 1)[None]], dim=1)
    text: str = tokenizer.decode(tokens[0], skip_special_tokens=True)
    return "".join(c if c.isprintable() or c == "\n" else "·" for c in text).strip("\n")
