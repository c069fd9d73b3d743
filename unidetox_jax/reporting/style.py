"""The page's style sheet: system fonts, colours as variables, light and dark; no file beside the page."""

CSS = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --wash: #f6f7f9; --ink: #22262b; --muted: #5a626c; --grid: #dfe3e8;
  --before: #b4532a; --after: #1b7a78; --control: #7a6bb0;
  --warn-paper: #fdf3e3; --warn-edge: #c77d1a; --warn-ink: #8a4f07; --link: #1b6a9a;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #16191d; --wash: #1e2227; --ink: #e4e7eb; --muted: #a3abb5; --grid: #363c44;
    --before: #e58a5f; --after: #4fbab5; --control: #aa9ce0;
    --warn-paper: #332a1b; --warn-edge: #d99a3d; --warn-ink: #e8b15f; --link: #7fbfe6;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body {
  margin: 0; background: var(--paper); color: var(--ink); overflow-wrap: break-word;
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", sans-serif;
}
main, header > div, nav > div, footer { max-width: 74rem; margin: 0 auto; padding: 0 1.25rem; }
header { padding: 2.5rem 0 1.25rem; }
h1 { font-size: clamp(1.7rem, 5vw, 2.4rem); line-height: 1.15; letter-spacing: -0.02em; margin: 0 0 0.4rem; }
h2 { font-size: 1.35rem; letter-spacing: -0.01em; line-height: 1.3; margin: 3.2rem 0 0.7rem; }
h3 { font-size: 1rem; margin: 1.8rem 0 0.4rem; }
p, li { max-width: 44rem; }
p { margin: 0.5rem 0 0.9rem; }
a { color: var(--link); }
:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; border-radius: 3px; }
.lead { color: var(--muted); font-size: 1.05rem; margin: 0; }
.small, figcaption { color: var(--muted); font-size: 0.875rem; line-height: 1.5; }
nav { border-block: 1px solid var(--grid); background: var(--paper); }
nav > div { display: flex; flex-wrap: wrap; gap: 0.15rem 1.2rem; padding-block: 0.6rem; font-size: 0.9rem; }
nav a { text-decoration: none; padding: 0.15rem 0; }
nav a:hover { text-decoration: underline; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 9.5rem), 1fr)); gap: 0.8rem;
  margin: 1.2rem 0; }
.card { border: 1px solid var(--grid); border-radius: 8px; background: var(--wash); padding: 0.75rem 1rem; }
.card dt { color: var(--muted); font-size: 0.875rem; line-height: 1.35; }
.card dd { margin: 0.15rem 0 0; font-size: 1.7rem; font-weight: 650; letter-spacing: -0.02em; line-height: 1.3;
  font-variant-numeric: tabular-nums; }
.card small { display: block; color: var(--muted); font-size: 0.8rem; font-weight: 400; letter-spacing: 0; }
.findings { padding-left: 1.2rem; margin: 0.6rem 0; }
.findings li { margin: 0.45rem 0; padding-left: 0.2rem; }
.findings li::marker { color: var(--after); }
.note { border-left: 3px solid var(--grid); padding: 0.1rem 0 0.1rem 1rem; color: var(--muted); }
.warning { border: 1px solid var(--warn-edge); border-left-width: 5px; border-radius: 6px;
  background: var(--warn-paper); padding: 0.75rem 1.1rem; margin: 1.4rem 0; }
.warning strong { display: block; }
.warning ul { margin: 0.3rem 0; padding-left: 1.1rem; }
.caption { margin: 1.2rem 0 0.5rem; }
.scroll { overflow-x: auto; margin: 0.5rem 0 1.2rem; border: 1px solid var(--grid); border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-size: 0.875rem; line-height: 1.4;
  font-variant-numeric: tabular-nums; }
th, td { padding: 0.5rem 0.75rem; text-align: right; vertical-align: top; white-space: nowrap; }
thead th { color: var(--muted); font-weight: 600; border-bottom: 1px solid var(--grid); background: var(--wash);
  vertical-align: bottom; }
th:first-child, td:first-child, .words { text-align: left; }
tbody th { font-weight: 600; }
tbody th small { display: block; font-size: 0.8rem; font-weight: 400; }
tbody tr + tr > * { border-top: 1px solid var(--grid); }
tbody.model + tbody.model > tr:first-child > * { border-top: 2px solid var(--grid); }
td small { display: block; color: var(--muted); font-size: 0.78rem; }
td small.shown { color: var(--ink); font-weight: 600; }
td.prose { white-space: normal; min-width: 15rem; text-align: left; }
.form::before { content: ""; display: inline-block; width: 0.6rem; height: 0.6rem; margin-right: 0.5rem;
  border-radius: 50%; background: var(--muted); }
.original::before { background: var(--before); }
.detoxified::before { background: var(--after); border-radius: 0; transform: rotate(45deg) scale(0.85); }
.control::before { background: var(--control); border-radius: 0; }
.plots { columns: 25rem 2; column-gap: 1.25rem; }
figure { margin: 0 0 1.25rem; break-inside: avoid; background: var(--paper);
  border: 1px solid var(--grid); border-radius: 8px; padding: 0.9rem; }
figure svg { display: block; width: 100%; height: auto; max-width: 36rem; margin: 0 auto; font-family: inherit; }
figure h3 { margin: 0 0 0.5rem; }
figcaption { margin-top: 0.5rem; }
details { border: 1px solid var(--grid); border-radius: 8px; margin: 0.8rem 0; background: var(--paper); }
summary { cursor: pointer; padding: 0.65rem 1rem; font-weight: 600; }
details[open] > summary { border-bottom: 1px solid var(--grid); }
details > .inside { padding: 0.4rem 1rem 0.9rem; }
details.content > summary { color: var(--warn-ink); }
blockquote { margin: 0.3rem 0 0.3rem; padding: 0.1rem 0 0.1rem 0.9rem; border-left: 2px solid var(--grid); }
blockquote.original { border-color: var(--before); }
blockquote.detoxified { border-color: var(--after); }
blockquote.control { border-color: var(--control); }
blockquote.original::before, blockquote.detoxified::before, blockquote.control::before { content: none; }
.chips { display: flex; flex-wrap: wrap; gap: 0.35rem; margin: 0.3rem 0 0.9rem; padding: 0; list-style: none; }
.chips li { background: var(--wash); border: 1px solid var(--grid); border-radius: 999px; padding: 0.05rem 0.65rem;
  font-size: 0.875rem; }
pre { overflow-x: auto; background: var(--wash); border-radius: 6px; padding: 0.8rem; font-size: 0.8rem;
  line-height: 1.45; margin: 0.5rem 0; }
code { font-size: 0.9em; overflow-wrap: anywhere; }
footer { color: var(--muted); font-size: 0.875rem; padding-block: 2.5rem; }
@media (max-width: 40rem) {
  header { padding-top: 1.6rem; }
  main, header > div, nav > div, footer { padding-inline: 0.9rem; }
  h2 { margin-top: 2.4rem; }
  th, td { padding: 0.45rem 0.6rem; }
  figure { padding: 0.6rem; }
  .scroll tr > :first-child { position: sticky; left: 0; background: var(--paper);
    box-shadow: 1px 0 0 var(--grid); max-width: 9.5rem; white-space: normal; }
  .scroll thead tr > :first-child { background: var(--wash); }
}
@media print { details { display: none; } .scroll { overflow: visible; } }
"""
