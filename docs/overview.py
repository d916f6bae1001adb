"""Draws docs/overview.svg, the picture of the README: `python docs/overview.py`. The figures are those of its table."""

from html import escape
from pathlib import Path
from typing import Final

# What is compared, eager's figure and fastops' in the README's table, and the ratio.
ROWS: Final = (
    ("Head of 32 000 classes: peak memory", "1 510 MiB", "112 MiB", 112 / 1510),
    ("the same: time on a CPU", "", "0.74", 0.74),
    ("Cross-entropy: bytes moved", "33.6 MB", "12.6 MB", 12.6 / 33.6),
    ("FashionMLP, training step: launches", "19", "13", 13 / 19),
    ("MLP, training step: time on a CPU", "64.9 ms", "0.50", 0.5),
    ("ResNet-18, inference: time on a CPU", "89.6 ms", "0.75", 0.75),
)
LEFT, WIDTH, LINE = 300, 360, 34
STYLE = """
text { font: 14px system-ui, sans-serif; fill: #1f2328 } .eager { fill: #d0d7de } .ours { fill: #2f6fde }
.figure { font-weight: 600 } @media (prefers-color-scheme: dark) { text { fill: #e6edf3 } .eager { fill: #3d444d } }
"""


def drawn() -> str:
    """The picture: a bar for each row, beside that of eager torch, which is as long in all."""
    height = LINE * (len(ROWS) + 1)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="760" height="{height}" viewBox="0 0 760 {height}" role="img">',
        f"<title>fastops beside eager torch, shorter is better</title><style>{STYLE}</style>",
        f'<text x="{LEFT}" y="20">fastops, as part of eager torch: shorter is better</text>',
    ]
    for row, (label, *_, ratio) in enumerate(ROWS, start=1):
        top = row * LINE
        lines += [
            f'<text x="{LEFT - 12}" y="{top + 15}" text-anchor="end">{escape(label)}</text>',
            f'<rect class="eager" x="{LEFT}" y="{top}" width="{WIDTH}" height="22" rx="3"/>',
            f'<rect class="ours" x="{LEFT}" y="{top}" width="{WIDTH * ratio:.0f}" height="22" rx="3"/>',
            f'<text class="figure" x="{LEFT + WIDTH + 8}" y="{top + 15}">{escape(f"{ratio:.2f}")}</text>',
        ]
    return "\n".join([*lines, "</svg>\n"])


if __name__ == "__main__":
    Path(__file__).with_name("overview.svg").write_text(drawn())
