"""The page's style: the system's fonts, light and dark as the reader has it, one column on a phone."""

STYLE = """
:root { color-scheme: light dark; --paper: #fbfbf9; --card: #fff; --ink: #1e1e22; --faint: #5d5d66; --line: #dcdcd6;
  --link: #0b5cad; --mark: #fff3cf; --c0: #0072b2; --c1: #c8500a; --c2: #00835f; --c3: #b1508a; --c4: #a87400;
  --c5: #2f93cf; --c6: #5b5b66; --c7: #7d5f14; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #16171a; --card: #1f2024; --ink: #ececf0; --faint: #a8a8b3; --line: #3a3b42; --link: #8cc2ff;
    --mark: #463a12; --c0: #5bb4f0; --c1: #ff9055; --c2: #3fcf9f; --c3: #eb9fcb; --c4: #f2bb3b; --c5: #a9defc;
    --c6: #bdbdc8; --c7: #d6b765; }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif;
  overflow-wrap: anywhere; }
header, main, footer { max-width: 1200px; margin: 0 auto; padding: 0 16px; }
header { padding-top: 24px; }
footer { padding-bottom: 32px; }
h1 { margin: 0 0 8px; font-size: 1.75rem; line-height: 1.2; }
h2 { margin: 48px 0 12px; padding-bottom: 4px; border-bottom: 1px solid var(--line); font-size: 1.375rem; }
h3 { margin: 28px 0 8px; font-size: 1.125rem; }
h4 { margin: 20px 0 8px; font-size: 1rem; }
p { margin: 8px 0; max-width: 80ch; }
a { color: var(--link); }
nav ul { display: flex; flex-wrap: wrap; gap: 4px 20px; margin: 12px 0; padding: 0; list-style: none; }
nav a { display: inline-block; padding: 4px 0; }
img { max-width: 100%; height: auto; vertical-align: top; border-radius: 4px; }
figure { margin: 0; }
figcaption { margin: 4px 0; font-size: 0.875rem; line-height: 1.4; }
.faint { color: var(--faint); }
.note { padding: 8px 12px; border-left: 4px solid var(--c4); background: var(--mark); }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(140px, 1fr)); gap: 12px 20px; margin: 16px 0; }
.facts dt { color: var(--faint); font-size: 0.875rem; }
.facts dd { margin: 0; font-weight: 600; }
.scroll { overflow-x: auto; margin: 12px 0; }
.scroll > img { max-width: none; }
table { border-collapse: collapse; font-size: 0.9375rem; overflow-wrap: normal; }
caption { padding: 4px 0; text-align: left; font-weight: 600; }
th, td { padding: 4px 16px 4px 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top;
  font-weight: 400; }
thead th { font-weight: 600; }
.numbers th + th, .numbers td { text-align: right; font-variant-numeric: tabular-nums; }
.pairs th { white-space: nowrap; }
.pairs td { min-width: 140px; overflow-wrap: anywhere; }
.pairs td:nth-child(4) { min-width: 280px; }
.changed { font-weight: 700; }
code { font: 0.9375em ui-monospace, monospace; }
summary { padding: 6px 0; cursor: pointer; font-weight: 600; }
summary h3 { display: inline; margin: 0; }
details { margin: 12px 0; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); gap: 24px; }
.chart svg { display: block; width: 100%; height: auto; }
.chart text { fill: var(--faint); font: 11px system-ui, sans-serif; }
.chart polyline { fill: none; stroke-width: 1.6; stroke-linejoin: round; }
.chart .grid { stroke: var(--line); stroke-width: 1; }
.key { display: flex; flex-wrap: wrap; gap: 2px 14px; margin: 4px 0 0; padding: 0; list-style: none;
  font-size: 0.8125rem; color: var(--faint); }
.chart .key svg { display: inline-block; width: 22px; height: 8px; vertical-align: middle; }
.key line { stroke-width: 2.5; }
.ink { stroke: var(--ink); }
.panels { display: grid; grid-template-columns: repeat(2, 1fr); gap: 12px; }
.panels img { width: 100%; }
.panels .faint { display: block; }
.panels > :first-child { grid-column: 1 / -1; }
@media (min-width: 700px) {
  .panels { grid-template-columns: repeat(5, 1fr); }
  .panels > :first-child { grid-column: auto; }
}
.looks { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 480px), 1fr)); gap: 20px 32px; }
.looks .panels { grid-template-columns: repeat(3, 1fr); }
.looks .panels > :first-child { grid-column: auto; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 350px), 1fr)); gap: 12px; margin: 0;
  padding: 0; list-style: none; }
.card { display: flex; gap: 12px; padding: 10px; border: 1px solid var(--line); border-radius: 6px;
  background: var(--card); font-size: 0.9375rem; line-height: 1.4; }
.card img { flex: none; width: 144px; align-self: flex-start; }
.card p { margin: 0 0 4px; }
article { margin: 20px 0; padding-top: 12px; border-top: 1px solid var(--line); }
article > p { margin-top: 0; }
.phrases { margin: 4px 0; padding: 0 0 0 1.2em; list-style: none; font-size: 0.875rem; line-height: 1.4; }
.phrases li { text-indent: -1.2em; }
.phrases .faint { display: inline; white-space: nowrap; }
.swatch { display: inline-block; width: 0.75em; height: 0.75em; border: 1px solid #1e1e22; border-radius: 2px; }
.solid, .dashed { display: inline-block; width: 1.6em; height: 1.1em; vertical-align: -0.15em; }
.solid { border: 2px solid currentcolor; }
.dashed { border: 2px dashed currentcolor; }
""" + "\n".join(f".c{k} {{ stroke: var(--c{k}); }} circle.c{k} {{ fill: var(--c{k}); }}" for k in range(8))
