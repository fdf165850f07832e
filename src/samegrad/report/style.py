"""The style sheet of the HTML report: light and dark, phone and desktop, screen and paper."""

from __future__ import annotations

_LIGHT = """
  --paper: #ffffff; --wash: #f6f7f8; --ink: #1c2024; --soft: #59626b; --rule: #dde1e5;
  --good: #00664a; --good-wash: #eaf6f1; --bad: #a63d00; --bad-wash: #fdf0e8; --open: #7a5700; --open-wash: #fcf5e2;
"""
_DARK = """
  --paper: #16191d; --wash: #1e2227; --ink: #e4e7ea; --soft: #a0a9b2; --rule: #343a41;
  --good: #5fd3ac; --good-wash: #15291f; --bad: #ff9d66; --bad-wash: #331f13; --open: #ecc155; --open-wash: #2d2613;
"""

STYLE_SHEET = (
    ":root { color-scheme: light dark;"
    + _LIGHT
    + "}\n@media screen and (prefers-color-scheme: dark) { :root {"
    + _DARK
    + "} }"
    + """
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Helvetica Neue", Arial, sans-serif; }
main { max-width: 808px; margin: 0 auto; padding: 40px 24px 72px; }
h1 { font-size: 1.65rem; line-height: 1.25; margin: 0 0 20px; font-weight: 650; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; line-height: 1.3; margin: 0 0 12px; font-weight: 650; }
h3 { font-size: 1rem; margin: 20px 0 4px; font-weight: 600; }
p { margin: 0 0 10px; overflow-wrap: anywhere; }
.whole { white-space: nowrap; }
section { margin-top: 40px; }
.kicker { color: var(--soft); font-size: .875rem; margin: 0 0 2px; }
.soft { color: var(--soft); }
.verdict { margin: 0; padding: 18px 22px 16px; border-radius: 8px; border-left: 5px solid; }
.verdict h2 { font-size: 1.4rem; margin: 0 0 4px; }
.verdict p { margin: 0; }
.verdict p + p { margin-top: 6px; }
.good { border-color: var(--good); background: var(--good-wash); }
.bad { border-color: var(--bad); background: var(--bad-wash); }
.open { border-color: var(--open); background: var(--open-wash); }
.good h2, .good-text { color: var(--good); }
.bad h2, .bad-text { color: var(--bad); }
.open h2, .open-text { color: var(--open); }
.good-text, .bad-text, .open-text { font-weight: 600; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(138px, 1fr)); gap: 1px; margin: 20px 0 0;
  border: 1px solid var(--rule); border-radius: 8px; overflow: hidden; }
.figures div { padding: 12px 14px; box-shadow: 0 0 0 1px var(--rule); }
.figures dt { color: var(--soft); font-size: .8125rem; }
.figures dd { margin: 0; font-size: 1.2rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.figures dd + dd { color: var(--soft); font-size: .8125rem; font-weight: 400; line-height: 1.35; }
figure { margin: 16px 0 0; }
figcaption { color: var(--soft); font-size: .875rem; margin-top: 6px; overflow-wrap: anywhere; }
figure svg { display: block; max-width: 100%; height: auto; }
.narrow { display: none; }
.picture img { display: block; max-width: 100%; height: auto; background: #fff; border: 1px solid var(--rule);
  border-radius: 6px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: 7px 16px 7px 0; border-bottom: 1px solid var(--rule); }
th { font-weight: 600; color: var(--soft); font-size: .8125rem; }
th:last-child, td:last-child { padding-right: 0; }
th[scope=row] { color: var(--ink); font-size: inherit; overflow-wrap: anywhere; }
th[scope=row] .soft { font-weight: 400; }
.checks td:nth-child(2) { white-space: nowrap; }
tbody tr:last-child > * { border-bottom: 0; }
td { overflow-wrap: anywhere; }
.number { text-align: right; white-space: nowrap; }
.pairs th { width: 11rem; }
code, pre { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: .875em; }
pre { background: var(--wash); border-radius: 6px; padding: 12px 14px; margin: 0; white-space: pre-wrap;
  overflow-wrap: anywhere; line-height: 1.5; }
table + pre, pre + table { margin-top: 14px; }
ul, ol { margin: 0; padding-left: 1.3rem; }
li { margin-bottom: 6px; overflow-wrap: anywhere; }
.lever { border-top: 1px solid var(--rule); padding: 12px 0 4px; }
.lever h3 { margin: 0 0 2px; }
.knobs { display: flex; flex-wrap: wrap; gap: 4px 20px; margin: 0 0 6px; padding: 0; list-style: none; }
.knobs li { margin: 0; }
@media (max-width: 640px) {
  main { padding: 24px 16px 48px; }
  h1 { font-size: 1.35rem; }
  .wide { display: none; }
  .narrow { display: block; }
  .narrow svg { width: 100%; max-width: 440px; }
  .pairs th { width: 9.2rem; }
  .checks thead { display: none; }
  .checks, .checks tbody, .checks tr, .checks th, .checks td { display: block; }
  .checks tr { border-bottom: 1px solid var(--rule); padding: 8px 0; }
  .checks tr:last-child { border-bottom: 0; }
  .checks th, .checks td { border: 0; padding: 1px 0; }
  .checks td[data-name] { display: flex; gap: 12px; text-align: left; white-space: normal; }
  .checks td[data-name]:empty { display: none; }
  .checks td[data-name]::before { content: attr(data-name); color: var(--soft); flex: 0 0 7rem; }
}
@media print {
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  body { font-size: 10.5pt; }
  main { max-width: none; padding: 0; }
  .whole { white-space: nowrap; }
section { margin-top: 22pt; }
  h2, h3 { break-after: avoid; }
  figure, tr, .lever, .verdict { break-inside: avoid; }
}
"""
)
