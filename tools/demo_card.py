"""Write the figures of the demo model into its card, between the marks in onekernel/demo/README.md.

    python tools/demo_card.py            # after tools/train_demo.py
    python tools/demo_card.py --check    # exit code 1 if the card does not say what the files say

The dimensions come from config.json, all that has to do with training from training.json, which train_demo.py writes.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

DEMO = Path(__file__).parent.parent / "onekernel" / "demo"
BEGIN = "<!-- written by tools/demo_card.py -->\n"
END = "<!-- /written by tools/demo_card.py -->\n"
SAMPLES = 3


def architecture(config: dict[str, Any], parameters: int) -> list[str]:
    text = config["text_config"]
    kinds = text["layer_types"]
    rows = {
        "parameters": f"{parameters:,}, the MTP head included",
        "hidden, intermediate": f"{text['hidden_size']}, {text['intermediate_size']}",
        "layers": f"{len(kinds)}: {kinds.count('linear_attention')} gated delta nets, "
        f"{kinds.count('full_attention')} attention",
        "gated delta net": f"{text['linear_num_key_heads']} key heads and {text['linear_num_value_heads']} value heads "
        f"of {text['linear_key_head_dim']}",
        "attention": f"{text['num_attention_heads']} heads and {text['num_key_value_heads']} KV head of "
        f"{text['head_dim']}, RoPE on {int(text['head_dim'] * text['rope_parameters']['partial_rotary_factor'])} dims",
        "MTP": f"{text['mtp_num_hidden_layers']} layer, trained with the model",
        "vocabulary": f"{text['vocab_size']:,} rows, the head is "
        f"{'tied to the embedding' if config['tie_word_embeddings'] else 'its own matrix'}",
        "context": f"{text['max_position_embeddings']:,} tokens by its config",
    }
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]


def training(report: dict[str, Any]) -> list[str]:
    loss, draft_loss = report["heldout_loss"], report["heldout_mtp_loss"]
    size, minutes = f"{report['tokens'] / 1e6:,.0f} million tokens", f"{report['seconds'] / 60:.1f} minutes"
    lines = [
        f"{report['steps']:,} steps, {size}, {minutes} on one {report['gpu']} with PyTorch {report['torch']}.",
        "",
        f"Loss on the held-out modules: **{loss:.3f}** (perplexity {math.exp(loss):.1f}); of the MTP head, which "
        f"guesses the token after the next, {draft_loss:.3f}.",
        "",
        "What it makes of some beginnings, greedily:",
    ]
    for sample in report["samples"][:SAMPLES]:
        fence = "````" if "```" in sample else "```"
        lines += ["", f"{fence}text", sample.rstrip("\n"), fence]
    return lines


def parameter_count(weights: Path) -> int:
    """Of a safetensors file, from its header."""
    with weights.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")


def section(folder: Path) -> str:
    """What belongs between the marks of the card in `folder`."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    lines = ["## Dimensions", "", *architecture(config, parameter_count(folder / "model.safetensors")), ""]
    lines += ["## Training run", ""]
    report = folder / "training.json"
    if report.is_file():
        lines += training(json.loads(report.read_text(encoding="utf-8")))
    else:
        lines.append("The figures of this training run were not recorded.")
    return "\n".join(lines) + "\n"


def filled(card: str, text: str) -> str:
    """`card` with `text` between its marks."""
    before, begin, rest = card.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"the card lacks the lines {BEGIN.strip()} and {END.strip()}")
    return f"{before}{begin}\n{text}\n{end}{after}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=DEMO, help="of the model (default: onekernel/demo)")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if the card is out of date")
    options = parser.parse_args(arguments)
    path = options.folder / "README.md"
    card = path.read_text(encoding="utf-8")
    wanted = filled(card, section(options.folder))
    if options.check:
        if card != wanted:
            print(f"{path} is out of date: run python tools/demo_card.py", file=sys.stderr)
        return int(card != wanted)
    path.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
