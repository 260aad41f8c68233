"""The report's style sheet: readable in light and dark, on a screen of any width. In Python, so that every install
has it.
"""

STYLE = """\
:root {
  color-scheme: light dark;
  --page: #fbfaf8; --card: #ffffff; --ink: #1d1c1a; --ink-soft: #6a6862; --line: #e4e1da; --accent: #0b6e99;
  --s1: #0b6e99; --s2: #c4541b; --s3: #2f7d4f; --s4: #8a4fa3; --s5: #a67c00; --s6: #b03060;
  --good: #2f7d4f; --bad: #b3261e;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #161719; --card: #1e2023; --ink: #ebe9e4; --ink-soft: #a3a19a; --line: #34373b; --accent: #5cb8e0;
    --s1: #5cb8e0; --s2: #f0935a; --s3: #74c493; --s4: #c79be0; --s5: #dcb545; --s6: #ee85a9;
    --good: #74c493; --bad: #ff8a80;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif;
}
main { max-width: 1120px; margin: 0 auto; padding: 2.5rem 1.25rem 5rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0; letter-spacing: -0.01em; }
h2 {
  font-size: 1.4rem; margin: 3.5rem 0 0.3rem; padding-top: 1.4rem; border-top: 1px solid var(--line);
  letter-spacing: -0.01em;
}
h3 { font-size: 1.02rem; margin: 2rem 0 0.6rem; }
p { margin: 0.4rem 0; max-width: 75ch; }
a { color: var(--accent); }
.soft, figcaption, th { color: var(--ink-soft); }
nav { margin: 1rem 0 0; display: flex; flex-wrap: wrap; gap: 0.4rem 1.1rem; }
.status {
  font-size: 0.8rem; padding: 0.12rem 0.6rem; border: 1px solid currentColor; border-radius: 99px;
  vertical-align: middle; margin-left: 0.6rem; letter-spacing: 0; font-weight: 500;
}
.good { color: var(--good); } .bad { color: var(--bad); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.6rem, 1fr)); gap: 0.7rem; margin: 1.2rem 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 0.7rem 0.9rem; }
.tile b {
  display: block; white-space: nowrap; font-size: 1.15rem; font-weight: 600;
  font-variant-numeric: tabular-nums; line-height: 1.3;
}
.tile span { color: var(--ink-soft); font-size: 0.83rem; }
.figures { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 0.9rem; }
@media (max-width: 780px) { .figures { grid-template-columns: minmax(0, 1fr); } }
figure {
  margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 0.8rem 0.8rem 0.4rem;
}
figure.wide, .figures > :only-child { grid-column: 1 / -1; }
figcaption { font-size: 0.9rem; margin: 0 0 0.2rem 0.2rem; }
svg { width: 100%; height: auto; display: block; }
svg text { font-family: inherit; }
.scroll { overflow-x: auto; }
.figures + .scroll, .scroll + .figures, nav + .scroll { margin-top: 0.9rem; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td {
  text-align: left; padding: 0.3rem 1.1rem 0.3rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top;
}
th { font-weight: 500; white-space: nowrap; }
td.number, th.number { text-align: right; }
pre {
  background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 0.8rem 1rem;
  overflow-x: auto; font: 0.84rem/1.5 ui-monospace, "Cascadia Code", Menlo, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; margin: 0.5rem 0;
}
code { font: 0.9em ui-monospace, "Cascadia Code", Menlo, monospace; }
details { margin: 0.6rem 0; }
summary { cursor: pointer; color: var(--accent); }
"""
