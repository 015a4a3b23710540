// The page of `cheaplunch serve`: what people do on it becomes prompts, prompts become questions, answers the mask.

import * as api from "./api.js";
import { chosen, dropped } from "./dropped.js";
import { LabelMap } from "./labels.js";
import { byId, element, markClass, showClasses, showPrompts, showSizes, Windowing } from "./panels.js";
import { listen } from "./pointer.js";
import { changedSlices, History, promptFile, sliceOf, withoutPrompt, withPrompt } from "./prompts.js";
import { Viewer } from "./viewer.js";

const stage = byId("stage");
const viewer = new Viewer(stage);
const windowing = new Windowing((darkest, brightest) => (viewer.window = [darkest, brightest]));

let model; // what /api/model says
let classes = []; // the model's, each with `hidden`
let current; // the class that a click is for
let tool = "click";
let ready; // once images can be shown
let work = null; // the image that is open, with all that was done on it
let opening = false; // whether another is on its way
let corner = null; // of a box that is set by keys, RAS
let maskHidden = false;
let windowKey = false;

// --- what is said ----------------------------------------------------------------------------------------------------

function say(line, wrong = false) {
  byId("status").textContent = line;
  byId("status").classList.toggle("wrong", wrong);
}

/** A line over the image with one way out; nothing takes it away. */
function trouble(line, way, act) {
  const [text, button] = byId("trouble").children;
  text.textContent = line;
  button.textContent = way;
  button.onclick = () => {
    byId("trouble").hidden = true;
    act();
  };
  byId("trouble").hidden = false;
}

const tasks = new Map(); // what is under way, the last on top: key → [line, share or null]

/** Says `line` while `act` goes on, which may tell how far it is, 0 to 1; its result is handed on. */
async function busy(line, act) {
  const key = Symbol();
  tasks.set(key, [line, null]);
  setTimeout(showWork, 200); // what is quick need not be said
  try {
    return await act((share) => {
      tasks.set(key, [line, share]);
      showWork();
    });
  } finally {
    tasks.delete(key);
    showWork();
  }
}

function showWork() {
  const last = [...tasks.values()].pop();
  byId("work").hidden = !last;
  if (!last) return;
  const [text, progress] = byId("work").children;
  text.textContent = last[0];
  if (last[1] === null) progress.removeAttribute("value");
  else progress.value = last[1];
}

// --- opening ---------------------------------------------------------------------------------------------------------

/** `source`: {case: {id, name}} or {files: [{file, path}]}. What was open stays where the new one is refused. */
async function open(source) {
  if (opening) return say("One image at a time: another is being opened.", true);
  opening = true;
  byId("refused").hidden = true;
  const name = source.case?.name ?? (source.files.length === 1 ? source.files[0].file.name : "the files");
  let opened;
  try {
    opened = await send(source, name);
    const buffer = await busy(`Loading ${opened.name}…`, (progress) => api.getImage(opened.open, progress));
    await ready;
    await busy(`Drawing ${opened.name}…`, () => viewer.show(buffer, opened.axis));
    if (work) api.close(work.opened.open);
    begin(opened, source);
  } catch (error) {
    if (opened) api.close(opened.open);
    refuseImage(error);
  } finally {
    opening = false;
  }
}

function send(source, name) {
  if (source.case) return busy(`Opening ${name}…`, () => api.openCase(source.case.id));
  return busy(`Sending ${name}…`, (progress) => api.openFiles(source.files, progress));
}

function refuseImage(error) {
  say(error.message, true);
  if (!viewer.image && work) work = null; // the viewer had let go of it
  if (work) return;
  showStart();
  byId("refused").textContent = error.message;
  byId("refused").hidden = false;
}

function begin(opened, source) {
  work = {
    opened,
    source,
    history: new History(),
    labels: new LabelMap(viewer.grid.shape, viewer.sliceAxis),
    asked: 0, // questions so far
    whole: null, // a question about the whole volume that is under way
    wholeAgain: false, // whether things have changed since
    segmented: false, // by a network that takes no prompts
    saved: null, // the state that was saved last
  };
  corner = null;
  document.body.classList.remove("empty", "choosing");
  document.title = `${opened.name} · cheaplunch`;
  byId("name").textContent = opened.name;
  byId("open").hidden = false;
  byId("windowing").hidden = viewer.isColor;
  if (!viewer.isColor) windowing.begin(viewer.range, viewer.usualWindow, viewer.window);
  showFormats(opened.formats);
  for (const label of viewer.labels) {
    const isMain = Number(label.dataset.world) === viewer.main;
    label.querySelector(".use").textContent = isMain ? (model.prompted ? "prompts go here" : "") : "moves the crosshair";
  }
  applyColors();
  showState();
  showSizes(classes.map(() => ""));
  showPlace();
  stage.focus({ preventScroll: true });
  say(model.prompted ? `${opened.name} is open. ${hint()}` : `${opened.name} is open.`);
}

/** Opens the image once more where the server has closed it; prompts stay. */
async function reopen() {
  const own = work;
  try {
    own.opened = await send(own.source, own.opened.name);
  } catch (error) {
    return failed(error, own);
  }
  if (own === work && (own.history.now.prompts.length || own.segmented)) askWhole(own);
}

function showStart() {
  document.body.classList.add(work ? "choosing" : "empty");
  byId("back").hidden = !work;
  byId("choose-files").focus();
}

function listCases(cases) {
  byId("listed").hidden = !model.cases;
  const show = () => {
    const wanted = byId("filter").value.trim().toLowerCase();
    const found = cases.filter(({ name }) => name.toLowerCase().includes(wanted));
    const rows = found.slice(0, 200).map((one) => {
      const button = element("button", { type: "button", textContent: one.name });
      button.addEventListener("click", () => open({ case: one }));
      return element("li", {}, button);
    });
    const more = found.length - rows.length;
    const line = more ? `and ${more} more: type to find them` : found.length ? "" : "none";
    byId("cases").replaceChildren(...rows, ...(line ? [element("li", { className: "soft", textContent: line })] : []));
  };
  byId("filter").hidden = cases.length < 8;
  byId("filter").addEventListener("input", show);
  show();
}

// --- prompts ---------------------------------------------------------------------------------------------------------

function hint() {
  const view = `${model.axis} view`; // the others move the crosshair, and say so
  if (tool === "box") return `Drag a box around the ${current.name} in the ${view}.`;
  return `In the ${view}: left click adds, right click takes away, Shift + drag: box.`;
}

/** Goes on to a state of the prompts, and asks for what it changes. */
function go(change) {
  const before = work.history.now;
  change(work.history);
  if (work.history.now === before) return;
  showState();
  if (before.carry || work.history.now.carry) askWhole(work);
  else askSlices(work, changedSlices(before, work.history.now, work.labels.axis));
}

function give(prompt) {
  if (!work || !model.prompted) return say("This network takes no prompts: press Segment.", true);
  go((history) => history.go(withPrompt(history.now, { class: current.name, ...prompt }, work.labels.axis)));
}

function click(ras, positive) {
  if (model.prompted && model.boxes_only && positive) {
    return say("This network knows boxes only: drag a box around the target, or press B and set corners with Enter.", true);
  }
  viewer.moveTo(ras);
  give({ kind: "point", voxel: viewer.grid.toFile(ras), positive });
}

function boxed(from, to) {
  give({ kind: "box", voxel: [viewer.grid.toFile(from), viewer.grid.toFile(to)] });
}

/** A corner of a box at the cursor; the second one ends it. */
function setCorner() {
  if (!corner) {
    corner = [...viewer.ras];
    viewer.draft = { from: corner, to: corner, color: current.color };
    viewer.draw();
    return say("First corner set. Move the cursor to the opposite one and press Enter; Esc drops the box.");
  }
  const from = corner;
  dropCorner();
  boxed(from, [...viewer.ras]);
}

function dropCorner() {
  corner = viewer.draft = null;
  viewer.draw();
}

function useTool(wanted) {
  tool = wanted;
  if (corner) dropCorner();
  byId("click-tool").setAttribute("aria-pressed", String(tool === "click"));
  byId("box-tool").setAttribute("aria-pressed", String(tool === "box"));
  byId("hint").textContent = hint();
}

function choose(of) {
  current = of;
  markClass(of);
  byId("hint").textContent = hint();
  if (viewer.draft) viewer.draft.color = of.color;
  say(`Prompts are for: ${of.name}`);
}

/** Everything that follows from the prompts, but for the mask. */
function showState() {
  const { prompts, carry } = work.history.now;
  const color = Object.fromEntries(classes.map((of) => [of.name, of.color]));
  viewer.marks = prompts.map((prompt) => ({
    prompt,
    color: color[prompt.class],
    slice: sliceOf(prompt, work.labels.axis),
  }));
  viewer.draw();
  showPrompts(
    viewer.marks,
    (prompt) => {
      viewer.moveToVoxel(prompt.kind === "box" ? middle(prompt.voxel) : prompt.voxel);
      stage.focus({ preventScroll: true });
    },
    (prompt) => go((history) => history.go(withoutPrompt(history.now, prompt))),
  );
  byId("undo").disabled = !work.history.canUndo;
  byId("redo").disabled = !work.history.canRedo;
  byId("clear").disabled = !prompts.length;
  byId("carry").disabled = !prompts.length && !carry;
  byId("carry").setAttribute("aria-pressed", String(carry));
  const ready = model.prompted ? prompts.length > 0 : work.segmented;
  for (const button of document.querySelectorAll("#formats button")) button.disabled = !ready;
  byId("save-prompts").disabled = !prompts.length;
  byId("hint").textContent = hint();
}

const middle = ([from, to]) => from.map((place, axis) => Math.round((place + to[axis]) / 2));

const undo = () => go((history) => history.undo());
const redo = () => go((history) => history.redo());
const clear = () => go((history) => history.go({ ...history.now, prompts: [] }));

function toggleCarry() {
  if (byId("carry").disabled) return say("Give a prompt first; then it is propagated.");
  go((history) => history.go({ ...history.now, carry: !history.now.carry }));
}

// --- questions and answers -------------------------------------------------------------------------------------------
//
// Questions are numbered, and a slice never takes an answer that is older than the one it shows (labels.js). Those about
// slices go out at once. Of those about the whole volume one is under way at a time: they are long, and only the last
// matters.

function askSlices(own, changed) {
  if (!changed.length) return;
  // Prompted slices steady one another within reach (smooth_mm), so that those around change as well.
  const { prompts } = own.history.now;
  const prompted = prompts.map((prompt) => sliceOf(prompt, own.labels.axis));
  const reach = own.opened.reach ?? Infinity;
  const around = prompted.filter((slice) => changed.some((one) => Math.abs(one - slice) <= reach));
  const slices = [...new Set([...changed, ...around])];
  const line = changed.length === 1 ? `Slice ${changed[0] + 1}…` : `${changed.length} slices…`;
  ask(own, line, slices, (answer, asked) => {
    for (const part of answer.parts) own.labels.putSlice(part.slice, part.mask, asked);
    return changed.length === 1 ? foundOn(own, changed[0]) : "Done.";
  });
}

function askWhole(own) {
  if (own.whole) {
    own.wholeAgain = true;
    return;
  }
  const line = own.history.now.carry ? "Propagating…" : "Segmenting…";
  own.whole = ask(own, line, null, (answer, asked) => {
    own.labels.putVolume(answer.mask, asked);
    return own.history.now.carry ? "Propagated to neighbours." : "Done.";
  }).finally(() => {
    own.whole = null;
    if (own.wholeAgain && own === work) askWhole(own);
    own.wholeAgain = false;
  });
}

/** Asks for `slices`, or the whole; `take` puts the answer into the labels and says what came of it. */
async function ask(own, line, slices, take) {
  const [asked, state] = [++own.asked, own.history.now];
  try {
    const answer = await busy(line, () => api.segment(own.opened.open, state, slices));
    const came = take(answer, asked);
    if (own !== work) return;
    viewer.showLabels(own.labels);
    showVolumes();
    showPlace();
    say(came);
  } catch (error) {
    if (own === work) failed(error, own, state);
  }
}

function failed(error, own, state) {
  if (!(error instanceof api.Refusal)) throw error;
  if (error.status === 0 || error.status === 503) {
    const kept = "Your prompts are kept on this page.";
    const line = error.status ? error.message : "The server does not answer. Start `cheaplunch serve` again if it has ended.";
    trouble(`${line} ${kept}`, "Try again", () => askWhole(own));
  } else if (error.status === 404) {
    trouble("The server has closed this image. Your prompts are kept on this page.", "Open it again", reopen);
  } else {
    // A prompt that it does not take would spoil every further question.
    if (state && own.history.now === state && own.history.canUndo) own.history.undo();
    showState();
    say(error.message, true);
  }
}

function foundOn(own, slice) {
  const { labels } = own;
  const inSlice = new Map();
  labels.eachVoxel(slice, (voxel) => inSlice.set(labels.data[voxel], (inSlice.get(labels.data[voxel]) ?? 0) + 1));
  const found = classes.filter((of) => inSlice.get(of.number)).map((of) => `${of.name} ${inSlice.get(of.number)} px`);
  return `Slice ${slice + 1}: ${found.join(", ") || "nothing found"}.`;
}

function showVolumes() {
  const counts = work.labels.counts();
  const inMl = work.opened.unit === "mm" ? viewer.image.hdr.pixDims.slice(1, 4).reduce((a, b) => a * b, 1e-3) : null;
  showSizes(
    classes.map(({ number }) => {
      if (!counts[number]) return "";
      return inMl ? `${(counts[number] * inMl).toLocaleString("en", { maximumSignificantDigits: 3 })} mL` : `${counts[number]} px`;
    }),
  );
}

// --- view ------------------------------------------------------------------------------------------------------------

function applyColors() {
  viewer.setColors(classes, maskHidden ? 0 : byId("opacity").valueAsNumber / 100);
}

function toggleMask() {
  maskHidden = !maskHidden;
  applyColors();
  say(maskHidden ? "The mask is hidden; H shows it." : "The mask is shown.");
}

function showPlace() {
  const voxel = viewer.voxel;
  const value = viewer.value;
  const number = work.labels.data[voxel[0] + work.labels.shape[0] * (voxel[1] + work.labels.shape[1] * voxel[2])];
  const here = classes.find((of) => of.number === number)?.name;
  const shown = Number.isInteger(value) ? value : Number(value)?.toPrecision(4);
  byId("place").textContent = [`voxel ${voxel.join(", ")}`, viewer.isColor ? null : `value ${shown}`, here]
    .filter(Boolean)
    .join(" · ");
}

viewer.onMove = () => {
  if (corner && viewer.ras[viewer.main] !== corner[viewer.main]) {
    dropCorner();
    say("The box was dropped: both corners must lie on one slice.", true);
  } else if (corner) {
    viewer.draft = { ...viewer.draft, to: [...viewer.ras] };
  }
  if (work) showPlace();
};

// --- saving ----------------------------------------------------------------------------------------------------------

const FORMATS = { "nii.gz": "NIfTI", nrrd: "NRRD", dcm: "DICOM SEG", same: "Mask" };

/** `formats`: what the server can write of this image; "same" says something new where it is the only one. */
function showFormats(formats) {
  const shown = formats.filter((format) => format !== "same" || formats.length === 1);
  const buttons = shown.map((format) => {
    const button = element("button", { type: "button", textContent: FORMATS[format] ?? format });
    button.dataset.format = format;
    button.addEventListener("click", () => saveMask(format));
    return button;
  });
  byId("formats").replaceChildren(...buttons);
}

async function saveMask(format) {
  const [own, state] = [work, work.history.now];
  try {
    const file = await busy("Saving…", () => api.save(own.opened.open, state, format));
    download(file.name, file.blob);
    own.saved = state;
    say(`Saved ${file.name}.`);
  } catch (error) {
    failed(error, own);
  }
}

function savePrompts() {
  const { opened, history } = work;
  const name = `${opened.name.split("/").pop()}.json`;
  work.saved = history.now;
  download(name, new Blob([promptFile(opened.name, history.now.prompts)], { type: "application/json" }));
  say(`Saved ${name}; cheaplunch predict --prompts takes it.`);
}

function download(name, blob) {
  const link = element("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

// --- keys ------------------------------------------------------------------------------------------------------------

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const SLICES = { PageUp: 1, ".": 1, PageDown: -1, ",": -1 };
const LETTERS = {
  b: () => useTool("box"),
  c: () => useTool("click"),
  h: toggleMask,
  p: toggleCarry,
  "+": () => viewer.zoom(1.25),
  "=": () => viewer.zoom(1.25),
  "-": () => viewer.zoom(0.8),
  0: () => viewer.resetZoom(),
};

function pressed(event) {
  const { key, target } = event;
  if (byId("keys").open || target.matches("input[type=number], input[type=search]")) return;
  if (key === "?") return stop(event, () => byId("keys").showModal());
  if (!work || document.body.classList.contains("choosing")) return;
  if (event.ctrlKey || event.metaKey) {
    const act = { z: event.shiftKey ? redo : undo, y: redo, s: () => byId("formats").firstChild?.click() }[key.toLowerCase()];
    if (act) stop(event, act);
    return;
  }
  if (event.altKey) return;
  if (key.toLowerCase() === "w") windowKey = true;
  const onImage = target === stage || target === document.body;
  if (onImage && ARROWS[key]) return stop(event, () => viewer.step(...ARROWS[key].map((by) => by * (event.shiftKey ? 10 : 1))));
  if (onImage && key === "Enter" && model.prompted) {
    return stop(event, () => (tool === "box" ? setCorner() : click([...viewer.ras], true)));
  }
  if (onImage && (key === "Backspace" || key === "Delete")) return stop(event, () => click([...viewer.ras], false));
  if (key === "Escape" && corner) return stop(event, dropCorner);
  if (SLICES[key]) return stop(event, () => viewer.scroll(viewer.main, SLICES[key]));
  if (/^[1-9]$/.test(key) && model.prompted && classes[key - 1]) return stop(event, () => choose(classes[key - 1]));
  const act = LETTERS[key.toLowerCase()];
  if (act && (model.prompted || !"bcp".includes(key))) stop(event, act);
}

function stop(event, act) {
  event.preventDefault();
  act();
}

// --- beginning -------------------------------------------------------------------------------------------------------

function wire() {
  listen(stage, viewer, {
    click: (ras, positive) => (model.prompted ? click(ras, positive) : viewer.moveTo(ras)),
    boxed,
    refuse: (line) => say(line, true),
    windowed: (level, width) => viewer.isColor || windowing.shift(level, width),
    usesBox: () => tool === "box",
    isWindowing: () => windowKey,
    color: () => current.color,
  });
  window.addEventListener("keydown", pressed);
  window.addEventListener("keyup", ({ key }) => key.toLowerCase() === "w" && (windowKey = false));
  window.addEventListener("blur", () => (windowKey = false));
  window.addEventListener("beforeunload", (event) => {
    const { prompts } = work?.history.now ?? { prompts: [] };
    if (prompts.length && work.saved !== work.history.now) event.preventDefault(); // the browser asks
  });
  window.addEventListener("pagehide", () => work && api.close(work.opened.open));
  const onClick = {
    "choose-files": () => byId("files").click(),
    "choose-folder": () => byId("folder").click(),
    back: () => document.body.classList.remove("choosing"),
    open: showStart,
    help: () => byId("keys").showModal(),
    "click-tool": () => useTool("click"),
    "box-tool": () => useTool("box"),
    carry: toggleCarry,
    undo,
    redo,
    clear,
    segment: () => {
      work.segmented = true;
      showState();
      askWhole(work);
    },
    "save-prompts": savePrompts,
  };
  for (const [id, act] of Object.entries(onClick)) byId(id).addEventListener("click", act);
  byId("opacity").addEventListener("input", () => {
    byId("opacity").nextElementSibling.textContent = `${byId("opacity").value} %`;
    maskHidden = false;
    applyColors();
  });
  for (const id of ["files", "folder"]) {
    byId(id).addEventListener("change", (event) => {
      const files = chosen(event.target);
      event.target.value = ""; // so that the same one can be chosen again
      if (files.length) open({ files });
    });
  }
  let over = 0; // of how many elements that lie within one another a file is held
  window.addEventListener("dragenter", () => document.body.classList.toggle("dropping", ++over > 0));
  window.addEventListener("dragleave", () => document.body.classList.toggle("dropping", --over > 0));
  window.addEventListener("dragover", (event) => event.preventDefault());
  window.addEventListener("drop", async (event) => {
    event.preventDefault();
    over = 0;
    document.body.classList.remove("dropping");
    const files = await dropped(event.dataTransfer);
    if (files.length) open({ files });
  });
}

function describe() {
  byId("model").textContent = `${model.method} · ${model.backbone}`;
  classes = model.classes.map((of) => ({ ...of, hidden: false }));
  current = classes[0];
  showClasses(classes, model.prompted, choose, (of) => {
    of.hidden = !of.hidden;
    applyColors();
  });
  byId("prompt-panel").hidden = !model.prompted;
  byId("auto-panel").hidden = model.prompted;
  byId("save-prompts").hidden = !model.prompted;
  if (model.prompted && model.boxes_only) {
    byId("kind").textContent = "This network knows boxes only: drag a box around the target. Clicks would find nothing.";
    byId("kind").hidden = false;
    useTool("box");
  }
}

async function main() {
  try {
    ready = viewer.start();
    model = await api.getModel();
    describe();
    listCases(model.cases ? await api.getCases() : []);
    wire();
    showStart();
    await ready;
  } catch (error) {
    trouble(error.message, "Try again", () => location.reload());
  }
}

/** For tests and the curious: what is shown, and where. */
window.cheaplunch = {
  get isDrawn() {
    return !viewer.frame;
  },
  get isIdle() {
    return this.isDrawn && tasks.size === 0;
  },
  get prompts() {
    return work?.history.now.prompts ?? [];
  },
  get mask() {
    return work && { shape: work.labels.shape, data: work.labels.data };
  },
  get voxel() {
    return viewer.voxel;
  },
  clientOf: (voxel) => viewer.clientOf(voxel),
  goTo: (voxel) => viewer.moveToVoxel(voxel),
};

main();
