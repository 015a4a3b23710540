// Three views of a volume by NiiVue, with our crosshair, prompts and mask over them.
//
// Places are RAS voxels (x towards right, y towards anterior, z towards superior), as NiiVue turns every image, or voxels
// of the image's file; `Grid` goes between the two. A view is named by the world axis that it looks along: 2 axial,
// 1 coronal, 0 sagittal. All are drawn as radiologists see them, so that on each both screen axes run against RAS.

const NAMES = ["Sagittal", "Coronal", "Axial"];
const SLICE_TYPE = [2, 1, 0]; // NiiVue's number of each view
const ACROSS = [1, 0, 0]; // RAS axis that runs along the screen from right to left
const DOWN = [2, 2, 1]; // and from bottom to top
const ENDS = ["R", "L", "A", "P", "S", "I"]; // of each RAS axis its positive and its negative end
export const AXES = { sagittal: 0, coronal: 1, axial: 2 };

const GAP_PX = 2;
const MOST_ZOOM = 12;

/** How a file's voxel axes lie in the patient: RAS axis `w` is the file's axis `axes[w]`, backwards where `flips[w]`. */
class Grid {
  constructor(permRAS, dims) {
    this.axes = Array.from(permRAS, (signed) => Math.abs(signed) - 1);
    this.flips = Array.from(permRAS, (signed) => signed < 0);
    this.shape = dims; // of the file's axes
    this.rasShape = this.axes.map((axis) => dims[axis]);
  }

  toFile(ras) {
    const file = [0, 0, 0];
    this.axes.forEach((axis, w) => (file[axis] = this.flips[w] ? this.rasShape[w] - 1 - ras[w] : ras[w]));
    return file;
  }

  toRas(file) {
    return this.axes.map((axis, w) => (this.flips[w] ? this.rasShape[w] - 1 - file[axis] : file[axis]));
  }

  /** A label map in the file's order as one in RAS order. */
  turned(data) {
    if (this.axes.every((axis, w) => axis === w) && !this.flips.includes(true)) return data;
    const fileStrides = [1, this.shape[0], this.shape[0] * this.shape[1]];
    const [sx, sy, sz] = this.axes.map((axis, w) => fileStrides[axis] * (this.flips[w] ? -1 : 1));
    const [nx, ny, nz] = this.rasShape;
    const turned = new Uint8Array(data.length);
    const start = this.toFile([0, 0, 0]).reduce((sum, place, axis) => sum + place * fileStrides[axis], 0);
    for (let z = 0, next = 0; z < nz; z++) {
      for (let y = 0; y < ny; y++) {
        for (let x = 0, from = start + y * sy + z * sz; x < nx; x++, from += sx) turned[next++] = data[from];
      }
    }
    return turned;
  }
}

export class Viewer {
  /** `stage` holds a canvas, an svg over it, and one `.view` for each of the three. */
  constructor(stage) {
    this.stage = stage;
    this.canvas = stage.querySelector("canvas");
    this.svg = stage.querySelector("svg");
    this.labels = [0, 1, 2].map((world) => stage.querySelector(`.view[data-world="${world}"]`));
    this.main = 2; // the view of the run's slices
    this.views = [];
    this.marks = []; // [{prompt, color}]
    this.draft = null; // a box that is being drawn: {from, to, color}, RAS
    this.onMove = () => {};
  }

  /** Errors where the browser has no WebGL 2, or NiiVue's file is not there. */
  async start() {
    if (!this.canvas.getContext("webgl2", { alpha: true, antialias: false })) {
      throw new Error("This browser has no WebGL 2, which the viewer needs. Switch it on, or take another browser.");
    }
    const { Niivue } = await import("./niivue.js").catch(() => {
      throw new Error("The viewer is not installed: the server's first lines say how to get it. Then reload this page.");
    });
    this.nv = new Niivue({
      backColor: [0, 0, 0, 1],
      crosshairWidth: 0, // ours is sharper
      dragAndDropEnabled: false,
      isColorbar: false,
      isOrientationTextVisible: false,
      isRadiologicalConvention: true,
      isSliceMM: false, // slices as they are in the file, which is as the network sees them
      logLevel: "error",
      multiplanarShowRender: 0,
      sagittalNoseLeft: true,
      show3Dcrosshair: false,
    });
    await this.nv.attachToCanvas(this.canvas, false);
    new ResizeObserver(() => this.image && this.#layOut()).observe(this.stage);
  }

  /** Shows a NIfTI (ArrayBuffer) whose slices for the run lie along `axis`. */
  async show(buffer, axis) {
    this.clear();
    await this.nv.loadFromArrayBuffer(buffer, "image.nii.gz");
    this.image = this.nv.volumes[0];
    this.range = rangeOf(this.image.img);
    this.main = AXES[axis];
    this.grid = new Grid(this.image.permRAS, [1, 2, 3].map((n) => this.image.hdr.dims[n]));
    this.nv.createEmptyDrawing();
    this.ras = this.grid.rasShape.map((length) => Math.floor(length / 2));
    this.resetZoom();
    this.#layOut();
  }

  clear() {
    if (!this.image) return;
    this.nv.closeDrawing();
    for (const volume of [...this.nv.volumes]) this.nv.removeVolume(volume);
    this.image = null;
    this.views = [];
    this.marks = [];
    this.draft = null;
    this.#drawOverlay();
  }

  // --- places -----------------------------------------------------------------------------------------------------

  /** The crosshair's voxel in the image's file. */
  get voxel() {
    return this.grid.toFile(this.ras);
  }

  /** The file's axis along which the run's slices lie, and the number of the one that is shown. */
  get sliceAxis() {
    return this.grid.axes[this.main];
  }

  get slice() {
    return this.voxel[this.sliceAxis];
  }

  /** The image's own value at the crosshair. */
  get value() {
    return this.image.getValue(...this.ras);
  }

  /** Puts the crosshair on a RAS voxel, or as near as the image goes. */
  moveTo(ras) {
    this.ras = ras.map((place, w) => Math.min(Math.max(Math.round(place), 0), this.grid.rasShape[w] - 1));
    this.draw();
    this.onMove();
  }

  moveToVoxel(voxel) {
    this.moveTo(this.grid.toRas(voxel));
  }

  /** Moves the crosshair on the screen of the run's view, px of the image to the right and down. */
  step(right, down) {
    const ras = [...this.ras];
    ras[ACROSS[this.main]] -= right;
    ras[DOWN[this.main]] -= down;
    this.moveTo(ras);
  }

  /** Goes on by slices of a view, towards the image's end in RAS. */
  scroll(world, slices) {
    const ras = [...this.ras];
    ras[world] += slices;
    this.moveTo(ras);
  }

  /** The view under a point of the page, and the RAS place there (not rounded); null outside of all. */
  at(clientX, clientY) {
    const box = this.stage.getBoundingClientRect();
    const [x, y] = [clientX - box.left, clientY - box.top];
    const view = this.views.find(({ rect: [left, top, width, height] }) => {
      return x >= left && x < left + width && y >= top && y < top + height;
    });
    if (!view?.tile) return null;
    const ras = [...this.ras];
    const { across, down } = view.tile;
    ras[ACROSS[view.world]] = (x - across.origin) / across.px;
    ras[DOWN[view.world]] = (y - down.origin) / down.px;
    const inside = ras.every((place, w) => place >= -0.5 && place < this.grid.rasShape[w] - 0.5);
    return { world: view.world, ras, inside };
  }

  /** Where a RAS place lies on a view, CSS px of the stage. */
  #onScreen(view, ras) {
    const { across, down } = view.tile;
    return [
      across.origin + across.px * ras[ACROSS[view.world]],
      down.origin + down.px * ras[DOWN[view.world]],
    ];
  }

  /** Where a voxel of the file lies in the run's view, px of the page. */
  clientOf(voxel) {
    const box = this.stage.getBoundingClientRect();
    const [x, y] = this.#onScreen(this.views[0], this.grid.toRas(voxel));
    return [box.left + x, box.top + y];
  }

  // --- zoom and window --------------------------------------------------------------------------------------------

  resetZoom() {
    this.nv.setPan2Dxyzmm([0, 0, 0, 1]);
    this.draw();
  }

  /** Zooms all views by a factor, `ras` staying where it is. */
  zoom(factor, ras = this.ras) {
    const [x, y, z, before] = this.nv.scene.pan2Dxyzmm;
    const after = Math.min(Math.max(before * factor, 1), MOST_ZOOM);
    if (after === 1) return this.resetZoom();
    const mm = this.nv.frac2mm(this.#fraction(ras));
    const pan = [x, y, z].map((shift, w) => shift + mm[w] * (before - after));
    this.nv.setPan2Dxyzmm([...pan, after]);
    this.draw();
  }

  /** Moves what is seen, so that `from` comes to lie where `to` is. */
  pan(from, to) {
    const [a, b] = [this.nv.frac2mm(this.#fraction(from)), this.nv.frac2mm(this.#fraction(to))];
    const [x, y, z, zoom] = this.nv.scene.pan2Dxyzmm;
    this.nv.setPan2Dxyzmm([...[x, y, z].map((shift, w) => shift + (b[w] - a[w]) * zoom), zoom]);
    this.draw();
  }

  get isColor() {
    return this.image.hdr.datatypeCode === 128 || this.image.hdr.datatypeCode === 2304; // NIfTI's RGB24, RGBA32
  }

  /** What is drawn black and white. */
  get window() {
    return [this.image.cal_min, this.image.cal_max];
  }

  /** What NiiVue finds sensible for this image. */
  get usualWindow() {
    return [this.image.robust_min, this.image.robust_max];
  }

  set window([darkest, brightest]) {
    this.image.cal_min = darkest;
    this.image.cal_max = brightest;
    this.nv.refreshLayers(this.image, 0);
    this.draw();
  }

  // --- the mask ---------------------------------------------------------------------------------------------------

  /** Draws a LabelMap's voxels. */
  showLabels(labels) {
    this.nv.drawBitmap = this.grid.turned(labels.data);
    this.nv.refreshDrawing(false);
    this.draw();
  }

  /** `classes`: [{number, color, hidden}]; opacity 0 to 1. */
  setColors(classes, opacity) {
    const [R, G, B, A] = [0, 1, 2, 3].map(() => new Array(256).fill(0));
    for (const { number, color, hidden } of classes) {
      [R[number], G[number], B[number]] = [1, 3, 5].map((place) => parseInt(color.slice(place, place + 2), 16));
      A[number] = hidden ? 0 : 255;
    }
    this.nv.drawOpacity = opacity;
    this.nv.drawRimOpacity = opacity && Math.min(opacity + 0.4, 1); // an outline shows where a mask ends
    this.nv.drawLut.lut = Uint8ClampedArray.from({ length: 1024 }, (_, n) => [R, G, B, A][n % 4][n >> 2]);
    this.nv.refreshColormaps();
    this.draw();
  }

  // --- drawing ----------------------------------------------------------------------------------------------------

  #fraction(ras) {
    return ras.map((place, w) => (place + 0.5) / this.grid.rasShape[w]);
  }

  /** Gives the run's view most of the stage, and the others what is left of it. */
  #layOut() {
    const [width, height] = [this.stage.clientWidth, this.stage.clientHeight];
    if (!width || !height) return;
    const others = [2, 1, 0].filter((world) => world !== this.main);
    const flat = this.grid.rasShape[this.main] === 1; // one slice has nothing to look at from the side
    const wide = width > height;
    const side = Math.round((wide ? width : height) * 0.34);
    const half = Math.round(((wide ? height : width) - GAP_PX) / 2);
    const rects = flat
      ? [[0, 0, width, height]]
      : wide
        ? [
            [0, 0, width - side - GAP_PX, height],
            [width - side, 0, side, half],
            [width - side, half + GAP_PX, side, height - half - GAP_PX],
          ]
        : [
            [0, 0, width, height - side - GAP_PX],
            [0, height - side, half, side],
            [half + GAP_PX, height - side, width - half - GAP_PX, side],
          ];
    this.views = [this.main, ...others].slice(0, rects.length).map((world, n) => ({ world, rect: rects[n] }));
    this.labels.forEach((label) => (label.hidden = true));
    for (const { world, rect } of this.views) {
      const label = this.labels[world];
      const [left, top, w, h] = rect.map((px) => `${px}px`);
      Object.assign(label.style, { left, top, width: w, height: h });
      label.hidden = false;
      label.classList.toggle("main", world === this.main);
      label.classList.toggle("flat", flat);
      const [right, up] = [ENDS.slice(ACROSS[world] * 2), ENDS.slice(DOWN[world] * 2)];
      label.querySelector(".left").textContent = right[0];
      label.querySelector(".right").textContent = right[1];
      label.querySelector(".top").textContent = up[0];
      label.querySelector(".bottom").textContent = up[1];
    }
    const share = ([left, top, w, h]) => [left / width, top / height, w / width, h / height];
    this.nv.customLayout = this.views.map(({ world, rect }) => ({ sliceType: SLICE_TYPE[world], position: share(rect) }));
    this.nv.resizeListener();
    this.draw();
  }

  /** Draws everything anew, at most once a frame. */
  draw() {
    if (!this.image || this.frame) return;
    this.frame = requestAnimationFrame(() => {
      this.frame = 0;
      if (this.image) this.drawNow();
    });
  }

  drawNow() {
    this.nv.scene.crosshairPos = this.#fraction(this.ras);
    this.nv.drawScene();
    const dpr = this.nv.uiData.dpr || 1;
    for (const view of this.views) {
      const index = this.nv.screenSlices.findIndex((tile) => tile.axCorSag === SLICE_TYPE[view.world]);
      const [left, top, width, height] = this.nv.screenSlices[index].leftTopWidthHeight;
      const first = this.nv.screenXY2TextureFrac(left, top, index, false);
      const last = this.nv.screenXY2TextureFrac(left + width, top + height, index, false);
      const line = (w, start, length) => {
        const px = length / ((last[w] - first[w]) * this.grid.rasShape[w]); // of the screen a voxel, signed
        return { px, origin: start - px * (first[w] * this.grid.rasShape[w] - 0.5) };
      };
      view.tile = {
        rect: [left, top, width, height].map((px) => px / dpr),
        across: line(ACROSS[view.world], left / dpr, width / dpr),
        down: line(DOWN[view.world], top / dpr, height / dpr),
      };
    }
    this.#drawOverlay();
    for (const { world } of this.views) {
      // Slices count as the file counts them, for the run's view; the others are for looking around.
      const [axis, label] = [this.grid.axes[world], this.labels[world]];
      label.querySelector(".name").textContent = NAMES[world];
      label.querySelector(".slice").textContent = `${this.voxel[axis] + 1} / ${this.grid.shape[axis]}`;
    }
  }

  #drawOverlay() {
    const parts = [];
    for (const view of this.views) {
      if (!view.tile) continue;
      const [left, top, width, height] = view.tile.rect;
      const clip = `view${view.world}`;
      parts.push(make("clipPath", { id: clip }, [make("rect", { x: left, y: top, width, height })]));
      const drawn = this.#crosshair(view);
      if (view.world === this.main) drawn.push(...this.#prompts(view));
      parts.push(make("g", { "clip-path": `url(#${clip})` }, drawn));
    }
    this.svg.replaceChildren(...parts);
  }

  /** Lines that leave the middle free. */
  #crosshair(view) {
    const [left, top, width, height] = view.tile.rect;
    const [x, y] = this.#onScreen(view, this.ras).map((place) => Math.round(place) + 0.5);
    const free = 9;
    return [
      [left, y, x - free, y],
      [x + free, y, left + width, y],
      [x, top, x, y - free],
      [x, y + free, x, top + height],
    ].map(([x1, y1, x2, y2]) => make("line", { class: "crosshair", x1, y1, x2, y2 }));
  }

  #prompts(view) {
    const drawn = [];
    const box = (from, to, color, name) => {
      const half = (place, w, other) => place[w] + (place[w] < other[w] ? -0.5 : 0.5); // boxes hold their corners
      const grown = [from.map((_, w) => half(from, w, to)), to.map((_, w) => half(to, w, from))];
      const [[x1, y1], [x2, y2]] = grown.map((corner) => this.#onScreen(view, corner));
      const [x, y] = [Math.min(x1, x2), Math.min(y1, y2)];
      const shape = { x, y, width: Math.abs(x2 - x1), height: Math.abs(y2 - y1), rx: 1 };
      drawn.push(make("rect", { class: "box-back", ...shape }), make("rect", { class: name, stroke: color, ...shape }));
    };
    for (const { prompt, color } of this.marks) {
      const corners = (prompt.kind === "box" ? prompt.voxel : [prompt.voxel]).map((voxel) => this.grid.toRas(voxel));
      if (corners[0][this.main] !== this.ras[this.main]) continue;
      if (prompt.kind === "box") {
        box(corners[0], corners[1], color, "box");
        continue;
      }
      const [x, y] = this.#onScreen(view, corners[0]);
      const sign = prompt.positive ? "M-3.5 0h7M0 -3.5v7" : "M-3.5 0h7";
      const fill = prompt.positive ? color : "#14161a";
      drawn.push(
        make("g", { class: prompt.positive ? "click" : "click off", transform: `translate(${x} ${y})` }, [
          make("circle", { r: 7.5, class: "click-back" }),
          make("circle", { r: 6.5, fill, stroke: prompt.positive ? "none" : color }),
          make("path", { d: sign, stroke: prompt.positive ? "#14161a" : color }),
        ]),
      );
    }
    if (this.draft) box(this.draft.from, this.draft.to, this.draft.color, "box draft");
    return drawn;
  }
}

/** The least and the greatest of an image's values. NiiVue's own are those of the image's middle. */
function rangeOf(values) {
  let [least, greatest] = [Infinity, -Infinity];
  for (let n = 0; n < values.length; n++) {
    if (values[n] < least) least = values[n];
    if (values[n] > greatest) greatest = values[n];
  }
  return [least, greatest];
}

function make(name, attributes, children = []) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}
