// The mask as the server gives it: one number a voxel, in the order of the image's file (i fastest).

export class LabelMap {
  /** `shape` is [I, J, K]; slices run along `axis`. */
  constructor(shape, axis) {
    this.shape = shape;
    this.axis = axis;
    this.data = new Uint8Array(shape[0] * shape[1] * shape[2]);
    this.asked = new Float64Array(shape[axis]); // of each slice the number of the question that it answers
  }

  /** Takes slice `k` from the answer to question number `asked`; true where it is newer than what is there. */
  putSlice(k, plane, asked) {
    if (asked <= this.asked[k]) return false;
    this.asked[k] = asked;
    this.eachVoxel(k, (voxel, place) => (this.data[voxel] = plane[place]));
    return true;
  }

  /** Takes every slice that is older than question `asked` from its answer about the whole volume. */
  putVolume(data, asked) {
    if (this.asked.every((before) => before < asked)) {
      this.data.set(data);
      this.asked.fill(asked);
      return;
    }
    for (let k = 0; k < this.asked.length; k++) {
      if (asked <= this.asked[k]) continue;
      this.asked[k] = asked;
      this.eachVoxel(k, (voxel) => (this.data[voxel] = data[voxel]));
    }
  }

  /** Number → how many voxels have it. */
  counts() {
    const counts = new Float64Array(256);
    for (let voxel = 0; voxel < this.data.length; voxel++) counts[this.data[voxel]]++;
    return counts;
  }

  /** Calls `use(voxel in data, pixel in the slice)` for a slice's pixels, the lower of its two axes fastest. */
  eachVoxel(k, use) {
    const strides = [1, this.shape[0], this.shape[0] * this.shape[1]];
    const [fast, slow] = [0, 1, 2].filter((axis) => axis !== this.axis);
    let place = 0;
    for (let v = 0; v < this.shape[slow]; v++) {
      const row = k * strides[this.axis] + v * strides[slow];
      for (let u = 0; u < this.shape[fast]; u++) use(row + u * strides[fast], place++);
    }
  }
}
