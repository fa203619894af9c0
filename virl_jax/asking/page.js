// The page for asking.  Whatever a model, a file or a person wrote goes into the page as text, never as markup.
"use strict";

const at = (id) => document.getElementById(id);
const form = at("form"), drop = at("drop"), file = at("file"), preview = at("preview"), stop = at("stop");
const SVG = "http://www.w3.org/2000/svg";
let limits = {upload_bytes: Infinity, question_chars: 4000};
let chosen = null, under = null, zooms = 0, size = [1, 1], corners = [];

function make(name, kind, text) {
  const element = document.createElement(name);
  if (kind) element.className = kind;
  if (text !== undefined) element.textContent = text;
  return element;
}

function alarm(text) {
  at("alert").textContent = text;
  at("alert").hidden = !text;
}

// --- the picture that the question is about

function choose(found) {
  alarm("");
  if (!found) return;
  chosen = null;
  preview.hidden = true;
  at("hint").hidden = false;
  at("name").textContent = "";
  if (found.size > limits.upload_bytes) {
    return alarm(`The file must have at most ${limits.upload_bytes / 1e6} MB; it has ${(found.size / 1e6).toFixed(1)}.`);
  }
  chosen = found;
  if (preview.src) URL.revokeObjectURL(preview.src);
  preview.src = URL.createObjectURL(found);
  preview.hidden = false;
  at("hint").hidden = true;
  at("name").textContent = `${found.name || "pasted picture"}, ${(found.size / 1e3).toFixed(0)} kB`;
}

preview.addEventListener("error", () => {
  preview.hidden = true;
  at("hint").hidden = false;
});
file.addEventListener("change", () => choose(file.files[0]));
for (const kind of ["dragenter", "dragover"]) {
  document.addEventListener(kind, (e) => { e.preventDefault(); drop.classList.add("over"); });
}
document.addEventListener("dragleave", (e) => { if (!e.relatedTarget) drop.classList.remove("over"); });
document.addEventListener("drop", (e) => {
  e.preventDefault();  // a file dropped beside the frame must not replace the page
  drop.classList.remove("over");
  if (e.dataTransfer) choose(e.dataTransfer.files[0]);
});
document.addEventListener("paste", (e) => {
  const found = e.clipboardData && [...e.clipboardData.files].find((each) => each.type.startsWith("image/"));
  if (found) choose(found);
});
at("question").addEventListener("keydown", (e) => {
  if (e.key === "Enter" && !e.shiftKey && !e.isComposing) {
    e.preventDefault();
    form.requestSubmit();
  }
});

function base64(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(new Error("The file cannot be read."));
    reader.readAsDataURL(blob);
  });
}

// --- events while the policy answers

function turn(number) {
  let found = at(`turn${number}`);
  if (!found) {
    document.querySelectorAll(".writing").forEach((each) => each.classList.remove("writing"));
    found = make("li", "turn said writing");
    found.id = `turn${number}`;
    const who = make("div", "who"), body = make("div", "body");
    who.append(make("span", "", "policy"));
    body.append(make("pre"));
    found.append(who, body);
    at("turns").append(found);
  }
  return found;
}

function rect(layer, box, kind) {
  for (const each of ["halo", `box ${kind}`]) {
    const shape = document.createElementNS(SVG, "rect");
    shape.setAttribute("class", each);
    for (const [name, value] of [["x", box[0]], ["y", box[1]], ["width", box[2] - box[0]],
                                 ["height", box[3] - box[1]]]) shape.setAttribute(name, value);
    layer.append(shape);
  }
}

function tag(box, number) {
  const left = 100 * box[0] / size[0], top = 100 * box[1] / size[1];
  const beside = corners.filter((each) => Math.abs(each[0] - left) < 6 && Math.abs(each[1] - top) < 6).length;
  corners.push([left, top]);
  const found = make("span", "tag", number);
  found.style.left = `min(${left}% + ${19 * beside}px, 100% - 18px)`;
  found.style.top = `max(${top}% - 19px, 0px)`;
  return found;
}

const whole = (box) => box.map((value) => Math.round(value * 10) / 10).join(", ");

const HAPPENS = {
  place(e) {
    at("status").textContent = e.ahead ? `Waiting: ${e.ahead} ${e.ahead === 1 ? "question comes" : "questions come"} first.`
      : "Your turn. A picture of another size may take a while to compile for.";
  },
  began(e) {
    size = [e.width, e.height];
    const picture = make("img"), layer = document.createElementNS(SVG, "svg");
    picture.src = e.picture;
    picture.alt = "the picture that the question is about";
    layer.setAttribute("viewBox", `0 0 ${e.width} ${e.height}`);
    layer.setAttribute("preserveAspectRatio", "none");
    layer.setAttribute("aria-hidden", "true");
    at("stage").style.aspectRatio = `${e.width}/${e.height}`;
    at("stage").replaceChildren(picture, layer);
    at("caption").textContent = `${e.width} × ${e.height} px, shown to the policy as ${e.shown.join(" × ")}`;
    at("status").textContent = "It looks at the picture.";
  },
  said(e) {
    const words = turn(e.turn).querySelector("pre");
    words.append(e.text);
    words.scrollTop = words.scrollHeight;
    at("status").textContent = "It thinks.";
  },
  looked(e) {
    const li = turn(e.turn), who = li.querySelector(".who");
    zooms += 1;
    who.prepend(make("span", "num", zooms));
    if (e.action !== "image_zoom_in_tool") who.append(make("span", "chip", e.action));
    const notes = [];
    if (e.region) {
      const layer = at("stage").querySelector("svg");
      rect(layer, e.region, "plain fresh");
      if (e.cut && whole(e.cut) !== whole([Math.floor(e.region[0]), Math.floor(e.region[1]), Math.ceil(e.region[2]),
                                           Math.ceil(e.region[3])])) rect(layer, e.cut, "cut");
      at("stage").append(tag(e.region, zooms));
      notes.push(`looks at (${whole(e.region)}) px of the original`);
    }
    if (e.crop) {
      const crop = make("img", "crop");
      crop.src = e.crop;
      crop.alt = `what look ${zooms} showed`;
      li.querySelector(".body").append(crop);
      notes.push(`gets (${whole(e.cut)}) back as ${e.shown.join(" × ")} px`);
    }
    if (e.text) notes.push(`told: ${e.text}`);
    li.append(make("p", "note", notes.join(" · ")));
    at("status").textContent = `It has looked ${zooms === 1 ? "once" : `${zooms} times`}.`;
  },
  refused(e) {
    const li = turn(e.turn);
    li.querySelector(".who").append(make("span", "chip warn", "refused"));
    li.append(make("p", "note", `told: ${e.error}`));
  },
  ended(e) {
    const final = at("final"), why = e.error ? `${e.stop}: ${e.error}` : e.stop;
    final.replaceChildren(make("small", "", e.answer === null ? "No answer: " : "Answer: "),
                          e.answer === null ? why.replaceAll("_", " ") : e.answer);
    final.hidden = false;
    at("status").textContent = "Done.";
  },
  failed(e) {
    alarm(e.error);
    at("status").textContent = "";
  },
};

async function listen(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "", over = false;
  for (;;) {
    const {value, done} = await reader.read();
    if (done) break;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines.filter(Boolean)) {
      const event = JSON.parse(line);
      if (Object.hasOwn(HAPPENS, event.kind)) HAPPENS[event.kind](event);
      over ||= event.kind === "ended" || event.kind === "failed";
    }
  }
  if (!over) throw new Error("The connection was cut off.");
}

form.addEventListener("submit", async (e) => {
  e.preventDefault();
  alarm("");
  if (under) return;
  const question = at("question").value, options = at("options").value.split("\n").filter((each) => each.trim());
  if (!chosen) return alarm("Choose a picture first.");
  under = new AbortController();
  zooms = 0;
  corners = [];
  at("send").disabled = true;
  stop.hidden = false;
  at("status").textContent = "Sending.";
  try {
    const body = JSON.stringify({image: await base64(chosen), question, options});
    const reply = await fetch("/ask", {method: "POST", headers: {"Content-Type": "application/json"}, body,
                                       signal: under.signal});
    if (!reply.ok) throw new Error((await reply.json()).error);
    at("asked").textContent = question;
    at("final").hidden = true;
    at("turns").replaceChildren();
    at("stage").replaceChildren();
    at("caption").textContent = "";
    at("result").hidden = false;
    await listen(reply);
  } catch (error) {
    at("status").textContent = under.signal.aborted ? "Stopped." : "";
    if (!under.signal.aborted) alarm(error.message);
  } finally {
    document.querySelectorAll(".writing").forEach((each) => each.classList.remove("writing"));
    under = null;
    at("send").disabled = false;
    stop.hidden = true;
  }
});
stop.addEventListener("click", () => under && under.abort());

fetch("/about").then((reply) => reply.json()).then((found) => {
  limits = found;
  at("about").textContent = Object.entries(found.about).map(([key, value]) => `${key} ${value}`).join(" · ");
  at("limits").textContent = `JPEG, PNG, WebP, GIF or BMP; at most ${found.upload_bytes / 1e6} MB and ` +
    `${found.upload_pixels / 1e6} million pixels`;
  at("question").maxLength = found.question_chars;
}).catch(() => alarm("The server cannot be reached."));
