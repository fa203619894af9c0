"""How the report looks: one style sheet for screens light and dark, narrow and wide, and for paper."""

CSS = """
:root{--ink:#1a1d21;--soft:#5d6570;--line:#e3e6ea;--paper:#fff;--tint:#f6f7f9;--accent:#1f6fb5;
--good:#1f6fb5;--bad:#b8420b;--warn:#8a5a00;--truth:#12b886;--correct:#2b8fe6;--redundant:#f2a900;
--erroneous:#e8542c;--plain:#8b93a0;
--mono:ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace}
@media (prefers-color-scheme:dark){:root{--ink:#e6e9ed;--soft:#98a2ae;--line:#2a3038;--paper:#12151a;
--tint:#191d23;--accent:#62aef0;--good:#62aef0;--bad:#f58a5c;--warn:#e5b04a}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.55 system-ui,-apple-system,'Segoe UI',
Roboto,'Helvetica Neue',sans-serif;font-variant-numeric:tabular-nums}
main{max-width:1200px;margin:0 auto;padding:56px 32px 96px}
h1,h2,h3,p,figure,ol,dl,dd,pre{margin:0;padding:0}
h1{font-size:2.1rem;line-height:1.2;font-weight:650;letter-spacing:-.02em;overflow-wrap:anywhere}
h2{font-size:1.3rem;font-weight:650;letter-spacing:-.01em}
h3{font-size:.95rem;font-weight:600}
small{font-size:.82em;color:var(--soft);font-weight:400}
section{margin-top:64px}
.eyebrow{font-size:.78rem;color:var(--soft);letter-spacing:.02em;overflow-wrap:anywhere}
.facts{margin-top:8px;color:var(--soft)}
.fine{font-size:.82rem;color:var(--soft)}
.dot{display:inline-block;width:8px;height:8px;border-radius:50%;margin:0 2px 0 10px;background:var(--accent)}
.dot.was{background:var(--plain)}

.cards{display:grid;grid-template-columns:repeat(5,1fr);gap:16px;margin-top:20px}
.card{border:1px solid var(--line);border-radius:10px;padding:16px 16px 14px;
display:flex;flex-direction:column}
.card h3{color:var(--soft);font-weight:500;font-size:.86rem}
.now{font-size:1.9rem;line-height:1.25;font-weight:650;letter-spacing:-.02em;margin-top:6px}
.now span{display:block;font-size:.9rem;letter-spacing:0;line-height:1.4}
.was{font-size:.84rem;color:var(--soft);margin-top:8px}
.change{font-size:.9rem;font-weight:600;margin-top:2px;color:var(--soft)}
.change small,.was small{display:inline-block}
.change.good{color:var(--good)}.change.bad{color:var(--bad)}.change.sure{color:var(--ink)}
.strip{display:block;width:100%;margin:auto 0 8px;padding-top:12px}
.strip .axis{stroke:var(--line)}
.strip line.was{stroke:var(--plain);stroke-width:2;stroke-opacity:.6}.strip circle.was{fill:var(--plain)}
.strip line.now{stroke:var(--accent);stroke-width:2;stroke-opacity:.6}.strip circle.now{fill:var(--accent)}

.tables{display:flex;flex-wrap:wrap;gap:32px 56px;margin-top:40px}
.tables>div{min-width:0;max-width:100%}.tables>.wide{flex:1 1 560px}.tables>:not(.wide){flex:0 1 300px}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.88rem;margin-top:8px}
th,td{padding:7px 16px 7px 0;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th:first-child{text-align:left}th{font-weight:500}thead th{color:var(--soft)}
th:last-child,td:last-child{padding-right:0}
.from{color:var(--soft)}

section>h2+.fine{margin-top:4px}
.charts{display:grid;grid-template-columns:repeat(3,1fr);gap:28px 32px;margin-top:12px}
section>h3{margin-top:32px;color:var(--soft);font-weight:500;padding-bottom:6px;
border-bottom:1px solid var(--line)}
.chart{min-width:0}
.curve{display:block;width:100%;height:auto;overflow:visible}

.alarms{margin:12px 0 0;padding-left:1.5em;max-width:92ch}.alarms li{margin-top:6px}
.alarms li::marker,.alarms b{color:var(--bad);font-weight:600}

.legend{display:flex;flex-wrap:wrap;gap:4px 20px;font-size:.84rem;color:var(--soft);margin:6px 0 18px}
.legend i{display:inline-block;width:18px;height:11px;border:2px solid;border-radius:2px;margin-right:7px;
vertical-align:-1px}
.legend .truth{border-color:var(--truth);border-style:dashed}.legend .correct{border-color:var(--correct)}
.legend .redundant{border-color:var(--redundant)}.legend .erroneous{border-color:var(--erroneous)}
.gallery>input{position:absolute;opacity:0;pointer-events:none}
.picks{display:flex;gap:4px;overflow-x:auto;padding:3px;background:var(--tint);border-radius:9px;
width:fit-content;max-width:100%}
.picks[hidden]{display:none}
.picks label{padding:5px 14px;border-radius:7px;font-size:.86rem;cursor:pointer;white-space:nowrap}
.pane{display:none}
.traj{padding:36px 0;border-bottom:1px solid var(--line)}
.traj h3{font-size:1.12rem;line-height:1.4;margin:2px 0 6px;max-width:76ch;overflow-wrap:anywhere}
.options{padding-left:1.6em;display:flex;flex-wrap:wrap;gap:0 36px;margin-bottom:6px;overflow-wrap:anywhere}
.answers{display:flex;flex-wrap:wrap;gap:2px 28px;margin-bottom:8px}
.answers div{display:flex;gap:8px;min-width:0}.answers dt{color:var(--soft)}
.answers dd{font-weight:600;overflow-wrap:anywhere;min-width:0}.answers i{font-weight:400;color:var(--soft)}
.chips{display:flex;flex-wrap:wrap;gap:6px}
.chip{display:inline-block;font-size:.78rem;line-height:1.5;padding:1px 8px;border-radius:5px;
background:var(--tint);color:var(--ink);white-space:nowrap}
.chip.good{background:var(--good);color:var(--paper)}.chip.bad{background:var(--bad);color:var(--paper)}
.chip.warn{color:var(--warn);box-shadow:inset 0 0 0 1px currentColor}
.chip.correct::before,.chip.redundant::before,.chip.erroneous::before{content:"";display:inline-block;width:8px;
height:8px;border-radius:2px;margin-right:6px;background:var(--correct)}
.chip.redundant::before{background:var(--redundant)}.chip.erroneous::before{background:var(--erroneous)}
.parts{display:flex;flex-wrap:wrap;gap:0 16px;font-size:.82rem;color:var(--soft);margin-top:6px}
.parts b{font-weight:500;color:var(--ink)}
.cols{display:grid;grid-template-columns:minmax(0,5fr) minmax(0,7fr);gap:36px;margin-top:20px;
align-items:start}
.pic{position:sticky;top:20px}
.pic figcaption{font-size:.78rem;color:var(--soft);margin-top:6px}
.stage{position:relative;width:100%;background:var(--tint);border-radius:4px}
.stage img,.stage svg{position:absolute;inset:0;width:100%;height:100%;border-radius:4px}
.stage svg{overflow:visible}
.pixels img{image-rendering:pixelated}
.stage rect{fill:none;vector-effect:non-scaling-stroke;pointer-events:stroke}
.halo{stroke:#000;stroke-opacity:.38;stroke-width:4.5}
.box{stroke-width:2.5}.box.truth{stroke:var(--truth);stroke-dasharray:7 5}.box.correct{stroke:var(--correct)}
.box.redundant{stroke:var(--redundant)}.box.erroneous{stroke:var(--erroneous)}.box.plain{stroke:#fff}
.tag,.num{display:inline-flex;align-items:center;justify-content:center;width:18px;height:18px;font-size:11.5px;
font-weight:700;line-height:1;color:#fff;background:var(--plain)}
.tag{position:absolute;border-radius:0 0 4px 0}
.num{border-radius:4px;flex:none}
.tag.correct,.num.correct{background:#1573c4}.tag.redundant,.num.redundant{background:#f2a900;color:#1a1200}
.tag.erroneous,.num.erroneous{background:#cf3f17}
.turns{list-style:none;display:flex;flex-direction:column;gap:18px}
.who{display:flex;flex-wrap:wrap;align-items:center;gap:6px;font-size:.82rem;font-weight:600;margin-bottom:4px}
.who .chip{font-weight:400}
.told .who{color:var(--soft);font-weight:500}
.body{display:flex;gap:16px;align-items:flex-start}
pre{flex:1 1 auto;min-width:0;font:12.5px/1.6 var(--mono);white-space:pre-wrap;overflow-wrap:anywhere;
max-height:26em;overflow-y:auto;unicode-bidi:isolate;border-left:2px solid var(--line);padding-left:12px}
.said pre{border-left-color:var(--accent)}
.told pre{color:var(--soft)}
.sp{color:var(--soft);opacity:.75}
.crop{flex:none;max-width:150px;max-height:150px;border-radius:4px;border:1px solid var(--line)}
.crop.tiny{width:112px;height:112px;object-fit:contain;image-rendering:pixelated;background:var(--tint)}
.note{font-size:.78rem;color:var(--soft);margin-top:4px;padding-left:14px;overflow-wrap:anywhere}

details summary{cursor:pointer;font-size:1.3rem;font-weight:650;letter-spacing:-.01em}
.config{max-width:760px}.config th,.config td{text-align:left;font:12.5px/1.5 var(--mono);white-space:normal;
overflow-wrap:anywhere}
.config th{color:var(--soft);width:45%}

@media screen and (max-width:1000px){.cards{grid-template-columns:repeat(3,1fr)}
.charts{grid-template-columns:repeat(2,1fr)}}
@media screen and (max-width:760px){main{padding:32px 18px 64px}section{margin-top:48px}h1{font-size:1.6rem}
.cards{grid-template-columns:repeat(2,1fr);gap:10px}.card{padding:12px}.now{font-size:1.5rem}
.charts,.cols{grid-template-columns:minmax(0,1fr)}.pic{position:static}.cols{gap:22px}}
@media screen and (max-width:520px){.body{flex-direction:column;gap:10px}pre{width:100%}}
@media print{:root{--ink:#000;--soft:#444;--line:#ccc;--paper:#fff;--tint:#f3f3f3;--accent:#1f6fb5;
--good:#1f6fb5;--bad:#b8420b;--warn:#8a5a00}body{font-size:10pt;-webkit-print-color-adjust:exact;print-color-adjust:exact}
main{max-width:none;padding:0}section{margin-top:28px}.pic{position:static}pre{max-height:none;overflow:visible}
.cards{grid-template-columns:repeat(3,1fr)}.charts{gap:14px 18px}.cols{gap:20px}
.card,.chart,.pic,.turn,tr,.traj>header{break-inside:avoid}h2,h3,.traj>header{break-after:avoid}}
"""
