// Shows trajectories: filters, a list, one or two of them side by side, an enlarged picture.
// Everything that a model or a data set wrote comes from the JSON in the page and goes into text nodes; nothing is ever
// parsed as markup.
"use strict";
(() => {
const root = document.getElementById("viewer");
if (!root) return;
const data = JSON.parse(document.getElementById("trajectories").textContent);
const {items, pictures, runs} = data;
const ROW = 60;            // height of a row of the list, as in page.css
const CLASSES = ["correct", "redundant", "erroneous"];
const find = name => root.querySelector(`[data-part="${name}"]`);

function make(tag, name, ...inside) {
  const it = document.createElement(tag);
  if (name) it.className = name;
  for (const each of inside) if (each !== null && each !== undefined && each !== false) it.append(each);
  return it;
}
function svg(tag, attributes, ...inside) {
  const it = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) it.setAttribute(key, value);
  it.append(...inside);
  return it;
}
function picture(index, alt, name) {
  const uri = index === null || index === undefined ? "" : pictures[index];
  if (!/^data:image\/(png|jpeg|webp);base64,/.test(uri || "")) return null;
  const it = make("img", name);
  it.alt = alt;
  it.decoding = "async";
  it.src = uri;
  return it;
}
const number = v => v === null || v === undefined ? "–" : String(Math.abs(v) >= 100 ? Math.round(v) : +v.toPrecision(3)).replace("-", "−");
const signed = v => v === null || v === undefined ? "–" : (v >= 0 ? "+" : "−") + Math.abs(v).toFixed(2);
const count = n => n.toLocaleString("en");
const chip = (text, name = "", title = "") => {
  const it = make("span", `chip ${name}`, text);
  if (title) it.title = title;
  return it;
};

// --- filters -------------------------------------------------------------------------------------------------------
const FILTERS = {          // name of a control: an item's values for it; an item may have several
  run: i => [runs[i.run]], when: i => [i.when], outcome: i => [i.outcome], change: i => [i.change],
  class: i => i.classes.length ? i.classes : ["no action"], stop: i => [i.stop], kind: i => [i.kind],
  source: i => [i.source]};
const SORTS = {
  "as they came": null,
  "IoU, lowest first": i => i.best === null ? 2 : i.best, "IoU, highest first": i => i.best === null ? 2 : -i.best,
  "reward, lowest first": i => i.reward === null ? 1e9 : i.reward,
  "reward, highest first": i => i.reward === null ? 1e9 : -i.reward,
  "longest first": i => -i.turns.length, "task": i => i.uid};
const controls = {};
for (const [name, of] of Object.entries(FILTERS)) {
  const select = find(name), counts = new Map();
  for (const item of items) for (const v of new Set(of(item))) if (v) counts.set(v, (counts.get(v) || 0) + 1);
  for (const [value, n] of counts) {
    const option = make("option", "", `${value} (${count(n)})`);
    option.value = value;
    select.append(option);
  }
  if (counts.size < 2) select.closest("label").hidden = true;
  controls[name] = select;
}
for (const name of Object.keys(SORTS)) find("sort").append(make("option", "", name));
if (items.every(i => i.best === null)) find("iou").hidden = true;
const low = find("low"), high = find("high"), search = find("search"), sort = find("sort");
const words = item => item.words ??= [item.uid, item.kind, item.question, item.answer, ...item.answers,
  ...(item.options || []), ...item.turns.flatMap(t => t.text)].join("\n").toLowerCase();

let shown = items.map((_, i) => i), at = 0, beside = null;  // `at` is a place in `shown`, `beside` a label or null
function filter(keep) {
  const chosen = Object.entries(controls).filter(([, select]) => select.value)
    .map(([name, select]) => [FILTERS[name], select.value]);
  const least = low.value === "" ? null : +low.value, most = high.value === "" ? null : +high.value;
  const wanted = search.value.trim().toLowerCase();
  const current = keep ? shown[at] : undefined;
  shown = [];
  items.forEach((item, i) => {
    for (const [of, value] of chosen) if (!of(item).includes(value)) return;
    if (least !== null && !(item.best >= least && item.best !== null)) return;
    if (most !== null && !(item.best <= most && item.best !== null)) return;
    if (wanted && !words(item).includes(wanted)) return;
    shown.push(i);
  });
  const by = SORTS[sort.value];
  if (by) {
    const key = new Map(shown.map(i => [i, by(items[i])]));
    shown.sort((a, b) => (key.get(a) > key.get(b)) - (key.get(a) < key.get(b)) || a - b);
  }
  at = Math.max(0, shown.indexOf(current));
  find("count").textContent = `${count(shown.length)} of ${count(items.length)}`;
  space.style.height = `${ROW * shown.length}px`;
  list.scrollTop = Math.max(0, ROW * at - list.clientHeight / 2);
  rows(true);
  if (shown[at] !== current || !current) draw();
}

// --- the list: only visible rows are in the page ---------------------------------------------------------------------
const list = find("list"), space = find("space");
let drawnFrom = -1, drawnTo = -1;
function rows(anew) {
  const from = Math.max(0, Math.floor(list.scrollTop / ROW) - 4);
  const to = Math.min(shown.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW) + 4);
  if (!anew && from === drawnFrom && to === drawnTo) return;
  [drawnFrom, drawnTo] = [from, to];
  space.replaceChildren(...Array.from({length: to - from}, (_, k) => row(from + k)));
  if (shown.length) list.setAttribute("aria-activedescendant", `row${at}`);
  else list.removeAttribute("aria-activedescendant");
}
function row(place) {
  const item = items[shown[place]];
  const about = [runs.length > 1 ? runs[item.run] : "", item.when, item.change, item.kind, item.best === null ? "" :
    `IoU ${item.best.toFixed(2)}`, item.reward === null ? "" : `reward ${signed(item.reward)}`];
  const it = make("div", `row ${item.outcome === "right" || item.outcome === "wrong" ? item.outcome : "open"}`,
    make("span", "mark", {right: "✓", wrong: "✗"}[item.outcome] || "·"),
    make("span", "q", item.question),
    make("span", "about", about.filter(Boolean).join(" · ")));
  it.id = `row${place}`;
  it.style.top = `${ROW * place}px`;
  it.setAttribute("role", "option");
  it.setAttribute("aria-selected", place === at);
  it.setAttribute("aria-setsize", shown.length);
  it.setAttribute("aria-posinset", place + 1);
  it.addEventListener("click", () => { go(place); narrow() && detail.scrollIntoView(); });
  return it;
}
const narrow = () => matchMedia("(max-width:760px)").matches;
function go(place) {
  if (!shown.length) return;
  at = Math.min(Math.max(place, 0), shown.length - 1);
  const top = ROW * at;
  if (top < list.scrollTop) list.scrollTop = top;
  if (top + ROW > list.scrollTop + list.clientHeight) list.scrollTop = top + ROW - list.clientHeight;
  rows(true);
  draw();
}

// --- one trajectory, or two ------------------------------------------------------------------------------------------
const detail = find("detail");
const same = new Map();
items.forEach((item, i) => same.set(item.uid, [...(same.get(item.uid) || []), i]));
const several = items.some(i => i.rollout);
const label = item => [runs.length > 1 ? runs[item.run] : "", item.when, several ? `${data.word} ${item.rollout}` : ""]
  .filter(Boolean).join(", ") || "the same";
let colour = "";
const COLOURS = {logp: "log-probability", advantage: "advantage", modulator: "modulator", gap: "trainer less sampler"};

const measured = item => Object.keys(COLOURS).filter(name =>
  item && item.turns.some(t => t.tokens && t.tokens[name] !== undefined));

function draw() {
  const item = items[shown[at]];
  if (!item) return detail.replaceChildren(make("p", "fine", "Nothing is left: change the filters."));
  const others = (same.get(item.uid) || []).filter(i => items[i] !== item);
  const other = beside === null ? undefined : others.find(i => label(items[i]) === beside) ??
    others.find(i => items[i].run !== item.run && items[i].when === item.when && items[i].rollout === item.rollout) ??
    others.find(i => items[i].run !== item.run) ?? others[0];
  const bar = make("div", "bar2");
  const step = (text, by, title) => {
    const it = make("button", "", text);
    it.type = "button"; it.title = title; it.disabled = at + by < 0 || at + by >= shown.length;
    it.addEventListener("click", () => go(at + by));
    return it;
  };
  if (items.length > 1) bar.append(step("←", -1, "previous (k)"), make("span", "fine", `${count(at + 1)} / ${count(shown.length)}`),
             step("→", 1, "next (j)"));
  if (others.length) {
    const select = make("select");
    select.setAttribute("aria-label", "the same task beside it");
    select.dataset.part = "beside";
    select.append(make("option", "", `alone (${count(others.length)} more of this task)`));
    others.forEach(i => { const o = make("option", "", label(items[i])); o.value = String(i); select.append(o); });
    select.options[0].value = "";
    select.value = other === undefined ? "" : String(other);
    select.addEventListener("change", () => { beside = select.value ? label(items[+select.value]) : null; draw(); });
    bar.append(make("label", "", "beside ", select));
  }
  const names = measured(item);
  if (names.length) {
    const select = make("select");
    select.setAttribute("aria-label", "what colours tokens");
    select.dataset.part = "colour";
    for (const name of ["", ...names]) {
      const o = make("option", "", COLOURS[name] || "no colours");
      o.value = name;
      select.append(o);
    }
    select.value = names.includes(colour) ? colour : "";
    select.addEventListener("change", () => { colour = select.value; draw(); });
    bar.append(make("label", "", "tokens by ", select));
  }
  const pair = other === undefined ? [item] : item.run > items[other].run ? [items[other], item] : [item, items[other]];
  detail.replaceChildren(...(bar.childNodes.length ? [bar] : []), make("div", pair.length > 1 ? "two" : "one", ...pair.map(i => article(i, pair.length > 1))));
}

function article(item, paired) {
  const head = make("header", "");
  head.append(make("p", "eyebrow", [paired || items.length > 1 && label(item) !== "the same" ? label(item) : "", item.kind || "task", item.source,
    item.uid].filter(Boolean).join(" · ")), make("h3", "", item.question));
  if (item.options) {
    const options = make("ol", "options", ...item.options.map(o => make("li", "", o)));
    options.type = "A";
    head.append(options);
  }
  const said = make("dl", "answers");
  const pairOf = (name, value) => make("div", "", make("dt", "", name), make("dd", "", value === null ? make("i", "", "none") : value));
  said.append(pairOf("answer", item.answer));
  if (item.answers.length) said.append(pairOf("accepted", item.answers.join(" | ")));
  const chips = make("p", "chips");
  if (item.outcome !== "no answer known") chips.append(chip(item.outcome, item.outcome === "right" ? "good" : "bad"));
  if (item.change) chips.append(chip(item.change));
  if (item.score !== null && item.score !== undefined) chips.append(chip(`score ${number(item.score)}`));
  if (item.stop) chips.append(chip(item.stop, item.stop === "answered" ? "" : "warn"));
  if (item.reward !== null) chips.append(chip(`reward ${signed(item.reward)}`));
  if (item.advantage !== null) chips.append(chip(`advantage ${signed(item.advantage)}`));
  head.append(said, chips);
  if (item.parts.length) head.append(make("p", "parts", ...item.parts.map(([name, value]) => make("span", "", `${name} `, make("b", "", signed(value))))));
  const crops = item.turns.map((turn, k) => turn.crop === null ? null : strip(item, turn, k)).filter(Boolean);
  const seen = item.picture !== null || item.drawn.length || item.truth.length;
  const left = make("div", "", seen ? stage(item, true) : make("p", "fine", item.left_out || "no picture is kept"));
  if (crops.length) left.append(make("div", "crops", ...crops));
  const scale = scaleOf(item);
  const turns = make("ol", "turns", ...item.turns.map(t => turn(item, t, scale)));
  const words = make("div", "");
  if (scale) words.append(legend(scale));
  words.append(turns);
  return make("article", paired ? "traj narrow" : "traj", head, make("div", "cols", left, words));
}

function stage(item, small) {
  const it = make("figure", "pic"), box = make(small ? "button" : "div", `stage${item.crisp ? " pixels" : ""}`);
  if (small) { box.type = "button"; box.setAttribute("aria-label", "enlarge the picture"); box.addEventListener("click", () => enlarge(item)); }
  box.style.aspectRatio = `${item.width}/${item.height}`;
  const shownPicture = picture(item.picture, "the picture that the question is about");
  if (shownPicture) box.append(shownPicture);
  else box.append(make("span", "without", item.left_out || "no picture is kept"));
  const over = svg("svg", {viewBox: `0 0 ${item.width} ${item.height}`, preserveAspectRatio: "none", "aria-hidden": "true"});
  const rect = (b, kind, title) => {
    const place = {x: b.x, y: b.y, width: b.width, height: b.height};
    over.append(svg("rect", {class: "halo", ...place}));
    const it = svg("rect", {class: `box ${kind}`, ...place}), told = svg("title", {});
    told.textContent = title;
    it.append(told);
    over.append(it);
  };
  for (const b of item.drawn) rect(b, b.kind, b.title);
  for (const b of item.truth) rect(b, "truth", "ground truth");
  box.append(over);
  for (const b of item.drawn) {
    const tag = make("span", `tag ${b.kind}`, String(b.number));
    tag.style.left = `min(${b.left}% + ${19 * b.beside}px,100% - 18px)`;
    tag.style.top = `max(${b.top}% - 19px,0px)`;
    box.append(tag);
  }
  it.append(box);
  if (small && shownPicture) it.append(make("figcaption", "", `${item.width} × ${item.height} px`));
  return it;
}

function strip(item, turn, k) {
  const it = make("button", "");
  it.type = "button";
  const pic = picture(turn.crop, `what ${turn.call} showed`, turn.tiny ? "crop tiny" : "crop");
  if (!pic) return null;
  it.append(pic, make("span", `num ${turn.kind}`, String(turn.number ?? "")));
  it.addEventListener("click", () => {
    const seen = pic.cloneNode();
    seen.className = turn.tiny ? "seen tiny" : "seen";
    open(make("figure", "", seen, make("figcaption", "", [turn.call, turn.class, ...turn.notes].filter(Boolean).join(" · "))));
  });
  return it;
}

function turn(item, t, scale) {
  const who = make("div", "who", t.number ? make("span", `num ${t.kind}`, String(t.number)) : null,
    make("span", "", t.role === "assistant" ? "policy" : t.role));
  if (t.other_action) who.append(chip(t.other_action, "", "visual action"));
  if (t.class !== null) who.append(chip(t.class, t.kind));
  if (t.iou !== null) who.append(chip(`IoU ${t.iou.toFixed(2)}`));
  if (t.modulator !== null) who.append(chip(`× ${number(t.modulator)}`, "", "modulator of the advantage"));
  if (t.advantage !== null) who.append(chip(`A ${signed(t.advantage)}`, "", "advantage of this turn's tokens"));
  if (t.error !== null) who.append(chip("refused", "warn", t.error));
  const body = make("pre", "");
  if (scale && t.tokens) tokens(body, t, scale);
  else t.text.forEach((text, i) => body.append(i % 2 ? make("span", "sp", text) : text));
  const it = make("li", `turn ${t.role === "assistant" ? "said" : "told"}`, who, body.textContent ? body : null);
  if (t.notes.length) it.append(make("p", "note", t.notes.join(" · ")));
  return it;
}

// --- tokens in colours ---------------------------------------------------------------------------------------------
const each = (values, i) => Array.isArray(values) ? values[i] : values;
function scaleOf(item) {
  if (!colour || !item.turns.some(t => t.tokens && t.tokens[colour] !== undefined)) return null;
  const all = item.turns.flatMap(t => t.tokens ? t.tokens[colour] ?? [] : []).filter(v => v !== null);
  const middle = colour === "modulator" ? 1 : 0;
  const least = {logp: 2, advantage: 1e-9, modulator: 0.1, gap: 1e-6}[colour];
  return {middle, far: all.reduce((most, v) => Math.max(most, Math.abs(v - middle)), least)};
}
function shade(v, scale) {
  if (v === null || v === undefined) return "";
  const by = (v - scale.middle) / scale.far;
  return `color-mix(in srgb, var(--${by < 0 ? "erroneous" : "correct"}) ${Math.round(70 * Math.min(1, Math.abs(by)))}%, transparent)`;
}
function tokens(body, t, scale) {
  const values = t.tokens;
  values.text.forEach((text, i) => {
    if (!text) return;
    const it = make("span", "tok", text);
    it.style.backgroundColor = shade(each(values[colour], i), scale);
    it.dataset.i = i;
    body.append(it);
  });
  const told = e => {
    const i = e.target.dataset?.i;
    const readout = body.closest("article").querySelector(".readout");
    if (i !== undefined) readout.textContent = Object.entries(COLOURS).filter(([key]) => values[key] !== undefined)
      .map(([key, name]) => `${name} ${number(each(values[key], i))}`).join(" · ");
  };
  body.addEventListener("pointerover", told);
  body.addEventListener("click", told);
}
function legend(scale) {
  const end = by => { const it = make("i", ""); it.style.backgroundColor = shade(scale.middle + by * scale.far, scale); return it; };
  const one = colour === "logp";
  return make("div", "scale fine", end(-1), `${number(scale.middle - scale.far)} to ${number(scale.middle + (one ? 0 : scale.far))}`,
    one ? null : end(1), make("span", "readout", "point at a token"));
}

// --- enlarged --------------------------------------------------------------------------------------------------------
const dialog = find("large"), large = find("inside");
function open(it) {
  large.replaceChildren(it);
  if (!dialog.open) dialog.showModal();
}
let zoom = 1, fitted = null;
function enlarge(item) {
  fitted = stage(item, false);
  fitted.dataset.ratio = item.width / item.height;
  zoom = 1;
  open(fitted);
  size();
}
function size() {
  if (!fitted) return;
  const ratio = +fitted.dataset.ratio, wide = Math.min(large.clientWidth, (innerHeight - 90) * ratio);
  fitted.style.width = `${zoom * wide}px`;
}
const nearer = by => { zoom = Math.min(8, Math.max(1, zoom * by)); size(); };
find("nearer").addEventListener("click", () => nearer(1.5));
find("farther").addEventListener("click", () => nearer(1 / 1.5));
find("boxes").addEventListener("click", () => root.classList.toggle("bare"));
find("close").addEventListener("click", () => dialog.close());
dialog.addEventListener("close", () => { fitted = null; });
dialog.addEventListener("click", e => { if (e.target === dialog) dialog.close(); });
addEventListener("resize", () => { size(); rows(true); });

// --- keys, mouse and touch -------------------------------------------------------------------------------------------
for (const select of [...Object.values(controls), sort]) select.addEventListener("change", () => filter(true));
for (const input of [low, high, search]) input.addEventListener("input", () => filter(true));
find("reset").addEventListener("click", () => {
  for (const it of [...Object.values(controls), low, high, search]) it.value = "";
  sort.selectedIndex = 0;
  filter(true);
});
let waits = false;
list.addEventListener("scroll", () => {
  if (waits) return;
  waits = true;
  requestAnimationFrame(() => { waits = false; rows(false); });
});
const KEYS = {
  j: () => go(at + 1), k: () => go(at - 1), b: () => root.classList.toggle("bare"),
  z: () => shown.length && enlarge(items[shown[at]]), "/": () => search.focus(),
  c: () => { const names = ["", ...measured(items[shown[at]])]; colour = names[(names.indexOf(colour) + 1) % names.length]; draw(); },
  s: () => { beside = beside === null ? "" : null; draw(); }};
addEventListener("keydown", e => {
  if (e.ctrlKey || e.metaKey || e.altKey) return;
  if (/^(INPUT|SELECT|TEXTAREA)$/.test(e.target.tagName)) {
    if (e.key === "Escape") e.target.blur();
    return;
  }
  if (dialog.open) {
    const by = {"+": 1.5, "=": 1.5, "-": 1 / 1.5}[e.key];
    if (by) { nearer(by); e.preventDefault(); }
    if (e.key !== "b") return;
  }
  const page = Math.max(1, Math.floor(list.clientHeight / ROW) - 1);
  const act = KEYS[e.key] || (e.target === list && {ArrowDown: () => go(at + 1), ArrowUp: () => go(at - 1),
    PageDown: () => go(at + page), PageUp: () => go(at - page), Home: () => go(0), End: () => go(shown.length - 1)}[e.key]);
  if (act) { e.preventDefault(); act(); }
});

if (data.beside) beside = "";
if (data.start) controls.run.value = data.start;
root.classList.add("ready");
filter(false);
})();
