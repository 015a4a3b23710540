// What was asked of the network: clicks and boxes, with undo and redo. Values only: nothing here knows page or server.
//
// A prompt is what the server takes: {class, kind: "point", voxel: [i, j, k], positive} or {class, kind: "box",
// voxel: [[i, j, k], [i, j, k]]}. A state is {prompts, carry}, never changed once it is made; `carry` says whether what
// was found goes on to the slices around.

const NOTHING = { prompts: [], carry: false };

export class History {
  #past = [];
  #future = [];
  now = NOTHING;

  get canUndo() {
    return this.#past.length > 0;
  }

  get canRedo() {
    return this.#future.length > 0;
  }

  /** Goes on to `state`; what was undone is forgotten. */
  go(state) {
    this.#past.push(this.now);
    this.#future = [];
    this.now = state;
  }

  undo() {
    if (!this.canUndo) return;
    this.#future.push(this.now);
    this.now = this.#past.pop();
  }

  redo() {
    if (!this.canRedo) return;
    this.#past.push(this.now);
    this.now = this.#future.pop();
  }
}

/** The slice that a prompt lies on; slices run along `axis` (0, 1, 2: i, j, k). */
export function sliceOf(prompt, axis) {
  return (prompt.kind === "box" ? prompt.voxel[0] : prompt.voxel)[axis];
}

/** `state` with one prompt more. A class has one box a slice: a second takes the place of the first. */
export function withPrompt(state, prompt, axis) {
  const replaced = (other) =>
    prompt.kind === "box" &&
    other.kind === "box" &&
    other.class === prompt.class &&
    sliceOf(other, axis) === sliceOf(prompt, axis);
  return { ...state, prompts: [...state.prompts.filter((other) => !replaced(other)), prompt] };
}

export function withoutPrompt(state, prompt) {
  return { ...state, prompts: state.prompts.filter((other) => other !== prompt) };
}

/** The slices on which two states were asked different things, in their order. */
export function changedSlices(before, after, axis) {
  const [old, current] = [new Set(before.prompts), new Set(after.prompts)];
  const differing = [
    ...before.prompts.filter((prompt) => !current.has(prompt)),
    ...after.prompts.filter((prompt) => !old.has(prompt)),
  ];
  return [...new Set(differing.map((prompt) => sliceOf(prompt, axis)))].sort((a, b) => a - b);
}

/** The file that `cheaplunch predict --prompts` takes, for the image called `name`. */
export function promptFile(name, prompts) {
  const entries = prompts.map((prompt) => {
    if (prompt.kind === "box") return { class: prompt.class, box: { voxel: prompt.voxel } };
    return { class: prompt.class, voxel: prompt.voxel, ...(prompt.positive ? {} : { label: 0 }) };
  });
  return JSON.stringify({ [name]: entries }, null, 1) + "\n";
}
