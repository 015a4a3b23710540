// The panels beside the image, made from values; what people do with them is told to functions that are given.

const EYE =
  '<svg viewBox="0 0 24 24" aria-hidden="true"><path d="M2 12s3.6-6.5 10-6.5S22 12 22 12s-3.6 6.5-10 6.5S2 12 2 12Z"/>' +
  '<circle cx="12" cy="12" r="2.8"/><path class="slash" d="M4 4l16 16"/></svg>';

export const byId = (id) => document.getElementById(id);

export function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

export function dot(color) {
  const made = element("span", { className: "dot" });
  made.style.setProperty("--colour", color);
  return made;
}

// --- classes ---------------------------------------------------------------------------------------------------------

/** One radio button a class, and one to hide it; `clickable` is whether a class is chosen at all. */
export function showClasses(classes, clickable, choose, toggle) {
  const rows = classes.map((of, index) => {
    const radio = element("input", { type: "radio", name: "class", value: of.name, checked: !index });
    radio.addEventListener("change", () => choose(of));
    const label = element("label", {}, ...(clickable ? [radio] : []), dot(of.color));
    label.append(element("span", { className: "name", textContent: of.name, title: of.name }));
    label.append(element("span", { className: "size" }));
    if (clickable && index < 9) label.append(element("kbd", { textContent: String(index + 1) }));
    const eye = element("button", { type: "button", className: "eye", title: `Hide ${of.name}`, innerHTML: EYE });
    eye.setAttribute("aria-label", `Hide ${of.name}`);
    eye.setAttribute("aria-pressed", "false");
    eye.addEventListener("click", () => {
      toggle(of);
      eye.setAttribute("aria-pressed", String(of.hidden));
    });
    return element("div", { className: "class" }, label, eye);
  });
  byId("classes").replaceChildren(...rows);
}

export function markClass(chosen) {
  for (const radio of document.querySelectorAll("#classes input")) radio.checked = radio.value === chosen.name;
}

/** `sizes`: a text for each class, in their order. */
export function showSizes(sizes) {
  document.querySelectorAll("#classes .size").forEach((size, index) => (size.textContent = sizes[index]));
}

// --- prompts ---------------------------------------------------------------------------------------------------------

/** `marks`: [{prompt, color, slice}], the last on top. */
export function showPrompts(marks, go, remove) {
  const rows = marks.map(({ prompt, color, slice }) => {
    const kind = prompt.kind === "box" ? "▢" : prompt.positive ? "+" : "−";
    const spoken = prompt.kind === "box" ? "box" : prompt.positive ? "click on" : "click off";
    const place = element("span", { textContent: `slice ${slice + 1}` });
    const to = element("button", { type: "button", className: "go" }, dot(color), `${kind} ${prompt.class}`, place);
    to.setAttribute("aria-label", `Go to ${spoken} ${prompt.class}, slice ${slice + 1}`);
    to.addEventListener("click", () => go(prompt));
    const away = element("button", { type: "button", textContent: "×", title: "Remove" });
    away.setAttribute("aria-label", `Remove ${spoken} ${prompt.class}, slice ${slice + 1}`);
    away.addEventListener("click", () => remove(prompt));
    return element("li", {}, to, away);
  });
  byId("prompts").replaceChildren(...rows.reverse());
}

// --- window ----------------------------------------------------------------------------------------------------------

const OF_CT = { "Soft tissue": [40, 400], Lung: [-600, 1500], Bone: [400, 1800], Brain: [40, 80] }; // level, width; HU
const AIR_HU = -500; // an image that goes below is taken for a CT

/** Level and window as sliders and numbers. `set(darkest, brightest)` draws them. */
export class Windowing {
  constructor(set) {
    this.set = set;
    this.inputs = ["level", "width"].map((name) => [byId(name), byId(`${name}-number`)]);
    for (const pair of this.inputs) {
      for (const [n, input] of pair.entries()) {
        input.addEventListener("input", () => {
          if (!Number.isFinite(input.valueAsNumber)) return;
          pair[1 - n].value = input.value;
          this.#tell();
        });
      }
    }
  }

  /** For an image with values in `range`, whose usual window is `usual`; each [least, greatest]. */
  begin(range, usual, now) {
    this.span = Math.max(range[1] - range[0], Number.MIN_VALUE);
    const step = Number.isInteger(range[0]) && Number.isInteger(range[1]) && this.span > 4 ? 1 : this.span / 500;
    this.least = step;
    this.digits = step === 1 ? 0 : Math.max(0, 2 - Math.floor(Math.log10(this.span)));
    for (const [least, greatest, pair] of [
      [range[0], range[1], this.inputs[0]],
      [step, this.span, this.inputs[1]],
    ]) {
      for (const input of pair) Object.assign(input, { step: input.type === "number" ? "any" : step });
      Object.assign(pair[0], { min: least, max: greatest });
    }
    const presets = { Auto: usual, "All values": range };
    if (range[0] < AIR_HU) {
      for (const [name, [level, width]] of Object.entries(OF_CT)) presets[name] = [level - width / 2, level + width / 2];
    }
    const buttons = Object.entries(presets).map(([name, ends]) => {
      const button = element("button", { type: "button", textContent: name });
      button.addEventListener("click", () => this.put(...ends));
      return button;
    });
    byId("presets").replaceChildren(...buttons);
    this.#show(...now);
  }

  put(darkest, brightest) {
    this.#show(darkest, brightest);
    this.#tell();
  }

  /** Changes level and width by shares of all values. */
  shift(level, width) {
    const [middle, wide] = [this.level + level * this.span, Math.max(this.width + width * this.span, this.least)];
    this.put(middle - wide / 2, middle + wide / 2);
  }

  #show(darkest, brightest) {
    [this.level, this.width] = [(darkest + brightest) / 2, brightest - darkest];
    for (const [value, pair] of [
      [this.level, this.inputs[0]],
      [this.width, this.inputs[1]],
    ]) {
      for (const input of pair) input.value = value.toFixed(this.digits);
    }
  }

  #tell() {
    [this.level, this.width] = this.inputs.map(([, number]) => number.valueAsNumber);
    this.width = Math.max(this.width, this.least);
    this.set(this.level - this.width / 2, this.level + this.width / 2);
  }
}
