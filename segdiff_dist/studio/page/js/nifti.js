// NIfTI-1 in and out. Voxels are as in the file: the first axis is the fastest.

const TYPES = {
  2: Uint8Array, 4: Int16Array, 8: Int32Array, 16: Float32Array, 64: Float64Array, 256: Int8Array, 512: Uint16Array,
  768: Uint32Array,
};
const HEADER = 352;
const MOST_VOXELS = 2 ** 28;

/** {dims, affine, voxels} of a file, turned to (right, anterior, superior). Throws Error. */
export async function readNifti(bytes) {
  const plain = bytes[0] === 0x1f && bytes[1] === 0x8b ? await through(bytes, new DecompressionStream("gzip")) : bytes;
  const view = new DataView(plain.buffer, plain.byteOffset, plain.byteLength);
  if (plain.byteLength < HEADER || view.getInt32(0, true) !== 348) throw new Error("not a NIfTI-1 file");
  const rank = view.getInt16(40, true);
  const dims = [0, 1, 2].map((axis) => (axis < rank ? view.getInt16(42 + 2 * axis, true) : 1));
  const Type = TYPES[view.getInt16(70, true)];
  const length = dims[0] * dims[1] * dims[2];
  if (!Type || Math.min(...dims) < 1 || length > MOST_VOXELS) throw new Error("a NIfTI file of a kind that is not read");
  const start = Math.max(HEADER, view.getFloat32(108, true));
  if (plain.byteLength < start + length * Type.BYTES_PER_ELEMENT) throw new Error("a NIfTI file that ends too soon");
  const stored = new Type(plain.slice(start, start + length * Type.BYTES_PER_ELEMENT).buffer);
  const [slope, offset] = [view.getFloat32(112, true), view.getFloat32(116, true)];
  const isScaled = slope && (slope !== 1 || offset) && Number.isFinite(slope);
  const voxels = isScaled ? Float32Array.from(stored, (value) => value * slope + offset) : stored;
  return toCanonical({ dims, affine: affineOf(view), voxels });
}

function affineOf(view) {
  if (view.getInt16(254, true) > 0)
    return [0, 1, 2].map((row) => [0, 1, 2, 3].map((k) => view.getFloat32(280 + 16 * row + 4 * k, true)));
  const side = (axis) => view.getFloat32(80 + 4 * axis, true) || 1;
  return [[side(0), 0, 0, 0], [0, side(1), 0, 0], [0, 0, side(2), 0]];
}

/** Axes in the order right, anterior, superior, each in that direction; oblique grids go to the nearest. */
function toCanonical({ dims, affine, voxels }) {
  const along = [0, 1, 2].map((axis) => nearest(affine.map((row) => Math.abs(row[axis]))));
  if (new Set(along).size < 3) throw new Error("a NIfTI file whose axes are not clear");
  const source = [0, 1, 2].map((world) => along.indexOf(world)); // the axis of the file for each of ours
  const flips = source.map((axis, world) => affine[world][axis] < 0);
  if (source.every((axis, world) => axis === world) && !flips.includes(true)) return { dims, affine, voxels };
  const steps = [1, dims[0], dims[0] * dims[1]];
  const [nx, ny, nz] = source.map((axis) => dims[axis]);
  const [sx, sy, sz] = source.map((axis, world) => (flips[world] ? -steps[axis] : steps[axis]));
  let first = 0;
  source.forEach((axis, world) => (first += flips[world] ? steps[axis] * (dims[axis] - 1) : 0));
  const turned = new voxels.constructor(voxels.length);
  for (let z = 0, to = 0; z < nz; z++)
    for (let y = 0; y < ny; y++) for (let x = 0; x < nx; x++) turned[to++] = voxels[first + x * sx + y * sy + z * sz];
  const origin = affine.map((row) =>
    source.reduce((sum, axis, world) => sum + (flips[world] ? row[axis] * (dims[axis] - 1) : 0), row[3]));
  const rows = affine.map((row, r) =>
    [...source.map((axis, world) => (flips[world] ? -row[axis] : row[axis])), origin[r]]);
  return { dims: [nx, ny, nz], affine: rows, voxels: turned };
}

const nearest = (sizes) => sizes.indexOf(Math.max(...sizes));

/** The side of a voxel along each axis, in mm. */
export const spacing = (affine) => [0, 1, 2].map((axis) => Math.hypot(...affine.map((row) => row[axis])) || 1);

/** One axial plane as a volume of its own, in its place. */
export function planeOf({ dims, affine, voxels }, plane) {
  const length = dims[0] * dims[1];
  const moved = affine.map((row) => [row[0], row[1], row[2], row[3] + plane * row[2]]);
  return { dims: [dims[0], dims[1], 1], affine: moved, voxels: voxels.slice(plane * length, (plane + 1) * length) };
}

/** A .nii.gz of labels. */
export async function labelFile({ dims, affine, voxels }) {
  const bytes = new Uint8Array(HEADER + voxels.length);
  const view = new DataView(bytes.buffer);
  view.setInt32(0, 348, true);
  [3, ...dims, 1, 1, 1, 1].forEach((size, k) => view.setInt16(40 + 2 * k, size, true));
  view.setInt16(70, 2, true); // uint8
  view.setInt16(72, 8, true);
  [1, ...spacing(affine), 1, 1, 1, 1].forEach((side, k) => view.setFloat32(76 + 4 * k, side, true));
  view.setFloat32(108, HEADER, true);
  view.setFloat32(112, 1, true);
  bytes[123] = 2; // mm
  view.setInt16(254, 1, true); // the affine is the scanner's
  affine.forEach((row, r) => row.forEach((value, k) => view.setFloat32(280 + 16 * r + 4 * k, value, true)));
  bytes.set([0x6e, 0x2b, 0x31, 0], 344);
  bytes.set(voxels, HEADER);
  return through(bytes, new CompressionStream("gzip"));
}

export function fromBase64(text) {
  return Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
}

async function through(bytes, stream) {
  const changed = new Blob([bytes]).stream().pipeThrough(stream);
  return new Uint8Array(await new Response(changed).arrayBuffer());
}
