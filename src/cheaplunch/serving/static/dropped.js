// Files that somebody dropped or chose, folders opened to their depths: [{file, path}].

/** Of a file input. */
export function chosen(input) {
  return [...input.files].map((file) => ({ file, path: file.webkitRelativePath || file.name }));
}

/** Of a drop. Must be called while its event is handled: the browser forgets what was dropped afterwards. */
export function dropped(transfer) {
  const items = [...transfer.items].filter((item) => item.kind === "file");
  return Promise.all(items.map(found)).then((lists) => lists.flat());
}

function found(item) {
  const entry = item.webkitGetAsEntry();
  if (entry) return below(entry);
  const file = item.getAsFile(); // without a place on a disk
  return [{ file, path: file.name }];
}

async function below(entry) {
  if (entry.isFile) {
    const file = await new Promise((resolve, reject) => entry.file(resolve, reject));
    return [{ file, path: entry.fullPath.replace(/^\//, "") }];
  }
  const reader = entry.createReader();
  const entries = [];
  for (;;) {
    const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject)); // a hundred at a time
    if (!some.length) break;
    entries.push(...some);
  }
  const shown = entries.filter(({ name }) => !name.startsWith("."));
  return (await Promise.all(shown.map(below))).flat();
}
