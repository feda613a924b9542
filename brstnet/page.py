"""What our pages have in common: how they look, and how a number and a picture are put into one.

Pages are single files that open from disk. Nothing is loaded from elsewhere; all text is escaped.
"""

import base64
from pathlib import Path

import numpy as np
from jinja2 import Environment

DASH, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"

STYLE = """\
:root { color-scheme: light dark; --page: #f7f7f5; --card: #fff; --ink: #1d2126; --soft: #667079;
  --line: #e3e5e4; --accent: #1f6f5c; --tint: #e9f3ef; --control: #a9b1b6; --bad: #a63d2f;
  --warm: #fbf1e6 }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --card: #1b1f23; --ink: #e6e8ea;
  --soft: #97a1a9; --line: #2d3338; --accent: #63c0a6; --tint: #1d302b; --control: #5d676e;
  --bad: #e58a7b; --warm: #33281c } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 96rem; padding: 2rem clamp(1rem, 3vw, 2.5rem) 4rem;
  background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif }
h1 { margin: 0; font-size: 1.9rem; letter-spacing: -.02em; overflow-wrap: anywhere }
h2 { margin: 2.5rem 0 .6rem; font-size: 1.15rem }
.soft, .label, footer, figcaption { color: var(--soft) } .label { font-size: .8rem }
p { max-width: 54rem }
.protocol { margin: .8rem 0 1.4rem; padding: .55rem .9rem; border-left: 3px solid var(--accent);
  background: var(--tint); border-radius: 0 6px 6px 0; overflow-wrap: anywhere }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: .8rem }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: .8rem 1rem; min-width: 0 }
.big { font-size: 1.75rem; font-weight: 600; line-height: 1.3 }
.scroll { overflow-x: auto; padding: 0 }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { padding: .4rem .6rem; font-size: .87rem; text-align: left;
  border-bottom: 1px solid var(--line) } tbody tr:last-child td { border-bottom: 0 }
th { color: var(--soft); font-weight: 600 } .n { text-align: right }
a { color: var(--accent) }
img { display: block; max-width: 100%; background: #fff; border-radius: 8px }
summary { cursor: pointer } footer { margin-top: 3rem; font-size: .8rem; overflow-wrap: anywhere }
"""
"""Colours for day and night, type, cards and tables; a page adds its own after it."""


def environment() -> Environment:
    """Jinja with all text escaped, the style as `style`, and the filters number and picture."""
    found = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    found.filters |= {"number": number, "picture": picture}
    found.globals["style"] = STYLE
    return found


def number(value: float | None, digits: int = 3) -> str:
    """Fixed digits with a real minus sign; a dash where there is no value."""
    if value is None or not np.isfinite(value):
        return DASH
    return f"{value:.{digits}f}".replace("-", MINUS)


def picture(path: Path) -> str:
    """A PNG as an address that holds it."""
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
