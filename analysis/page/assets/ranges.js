// Rows of an archive on a web server: one chunk by range, its checksum compared, and the values of one row.
"use strict";

residua.ranges = (() => {
  const { el, number, count } = residua;
  const table = Uint32Array.from({ length: 256 }, (_, n) => {
    let value = n;
    for (let bit = 0; bit < 8; bit += 1) value = value & 1 ? (value >>> 1) ^ 0x82f63b78 : value >>> 1;
    return value >>> 0;
  });

  const crc32c = (bytes) => {
    let value = 0xffffffff;
    for (const byte of bytes) value = table[(value ^ byte) & 255] ^ (value >>> 8);
    return (value ^ 0xffffffff) >>> 0;
  };

  const half = (bits) => {
    const exponent = (bits >> 10) & 31;
    const part = bits & 1023;
    const sign = bits & 0x8000 ? -1 : 1;
    if (exponent === 0) return sign * part * 2 ** -24;
    if (exponent === 31) return part ? NaN : sign * Infinity;
    return sign * (1 + part / 1024) * 2 ** (exponent - 15);
  };

  const decode = (bytes, dtype) => {
    const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
    const size = { float64: 8, float32: 4, float16: 2, bfloat16: 2 }[dtype];
    return Float64Array.from({ length: bytes.byteLength / size }, (_, i) => {
      if (dtype === "float64") return view.getFloat64(i * 8, true);
      if (dtype === "float32") return view.getFloat32(i * 4, true);
      const bits = view.getUint16(i * 2, true);
      if (dtype === "float16") return half(bits);
      const wide = new DataView(new ArrayBuffer(4));
      wide.setUint32(0, bits * 65536);
      return wide.getFloat32(0);
    });
  };

  // The values of one row of the archive, as stored.
  const row = async (ranges, wanted) => {
    const shard = Math.floor(wanted / ranges.rows_per_shard);
    const inShard = wanted % ranges.rows_per_shard;
    const chunk = Math.floor(inShard / ranges.rows_per_chunk);
    const start = chunk * ranges.chunk_bytes;
    const url = ranges.url.replace("{shard}", shard);
    const answer = await fetch(url, { headers: { Range: `bytes=${start}-${start + ranges.chunk_bytes - 1}` } });
    if (answer.status !== 206) throw new Error(`the server answered ${answer.status} to a request for a part of ${url}`);
    const bytes = new Uint8Array(await answer.arrayBuffer());
    if (bytes.length !== ranges.chunk_bytes) throw new Error(`${count(bytes.length)} bytes came, and ${count(ranges.chunk_bytes)} were asked for`);
    const stored = new DataView(bytes.buffer).getUint32(bytes.length - 4, true);
    if (crc32c(bytes.subarray(0, -4)) !== stored) throw new Error("the chunk's checksum differs: run residua verify");
    const at = (inShard % ranges.rows_per_chunk) * ranges.row_bytes;
    return decode(bytes.subarray(at, at + ranges.row_bytes), ranges.dtype);
  };

  // Every value of a row as a bar from the middle.
  const bars = (values) => {
    const width = 280;
    const height = 90;
    const most = values.reduce((found, value) => (Number.isFinite(value) ? Math.max(found, Math.abs(value)) : found), 0) || 1;
    const step = width / values.length;
    const path = Array.from(values, (value, i) => `M${(i * step).toFixed(2)} ${height / 2}V${(height / 2 - ((Number.isFinite(value) ? value : 0) / most) * (height / 2 - 2)).toFixed(2)}`);
    return el("svg", { viewBox: `0 0 ${width} ${height}`, width, height, class: "chart", role: "img", "aria-label": `The ${values.length} values of the row` }, el("path", { d: path.join(""), class: "curve thin" }));
  };

  const button = (ranges, wanted) => {
    const place = el("div", { class: "fetched" });
    const load = async () => {
      place.replaceChildren(el("p", { class: "quiet" }, "Fetching a chunk…"));
      try {
        const values = await row(ranges, wanted);
        let most = 0;
        let squares = 0;
        values.forEach((value, i) => {
          squares += value * value;
          if (Math.abs(value) > Math.abs(values[most])) most = i;
        });
        place.replaceChildren(
          bars(values),
          el("p", { class: "quiet", dataset: { norm: Math.sqrt(squares) } }, `${count(values.length)} values, checksum compared; largest in channel ${most}: ${number(values[most])}`),
        );
      } catch (error) {
        place.replaceChildren(el("p", { class: "note" }, `The row cannot be fetched: ${error.message}. The server has to allow other pages (CORS) and ranges.`));
      }
    };
    place.append(el("button", { type: "button", onclick: load }, "Fetch the values of this row"));
    return place;
  };

  return { row, button };
})();
