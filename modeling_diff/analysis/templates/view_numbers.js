// What the page computes: maps from their bytes, differences, means, shares. T shown tokens; maps are T x T, row by row.

const WEIGHTS = Float32Array.from({ length: 256 }, (_, level) => (level / 255) ** 2);

async function inflate(text) {
  const packed = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

class Model {
  constructor(data) {
    Object.assign(this, data);
    this.size = data.tokens.length;
    this.unpacked = new Map();
  }

  // The layer's bytes; unpacked when it is first looked at.
  layerAt(index) {
    if (!this.unpacked.has(index)) this.unpacked.set(index, this.unpack(this.layers[index]));
    return this.unpacked.get(index);
  }

  async unpack(layer) {
    const [maps, outside, lambda] = await Promise.all([
      inflate(layer.maps),
      inflate(layer.outside),
      layer.lambda ? inflate(layer.lambda) : null,
    ]);
    return { ...layer, maps, outside, lambda: lambda && new Float32Array(lambda.buffer) };
  }

  // One head's map, added to `sum` with a factor; `normalize` brings every row's absolute weights, outside ones
  // included, to 1. Returns the weights outside, (T,).
  addMap(layer, head, kind, normalize, factor, sum, outsideSum) {
    const size = this.size;
    const triangle = (size * (size + 1)) / 2;
    const numMaps = layer.differential ? 2 : 1;
    const which = kind === "negative" && layer.differential ? 1 : 0;
    const first = (head * numMaps + which) * triangle;
    const firstOutside = (head * numMaps + which) * size;
    const subtract = kind === "difference" && layer.differential;
    for (let row = 0, at = 0; row < size; row++) {
      const lambda = subtract ? layer.lambda[head * size + row] : 0;
      const start = row * size;
      let outside = WEIGHTS[layer.outside[firstOutside + row]];
      if (subtract) outside -= lambda * WEIGHTS[layer.outside[firstOutside + size + row]];
      let scale = factor;
      if (normalize) {
        let total = Math.abs(outside);
        for (let key = 0; key <= row; key++) {
          const weight = WEIGHTS[layer.maps[first + at + key]];
          total += Math.abs(subtract ? weight - lambda * WEIGHTS[layer.maps[first + triangle + at + key]] : weight);
        }
        scale = total ? factor / total : 0;
      }
      outsideSum[row] += scale * outside;
      for (let key = 0; key <= row; key++, at++) {
        const weight = WEIGHTS[layer.maps[first + at]];
        sum[start + key] += scale * (subtract ? weight - lambda * WEIGHTS[layer.maps[first + triangle + at]] : weight);
      }
    }
  }

  // Layer and head are places in the lists, or "mean".
  async map(layerChoice, headChoice, kind, normalize) {
    const places = layerChoice === "mean" ? this.layers.map((_, place) => place) : [layerChoice];
    const layers = await Promise.all(places.map((place) => this.layerAt(place)));
    const having = headChoice === "mean" ? layers : layers.filter((layer) => headChoice < layer.heads.length);
    const weights = new Float32Array(this.size * this.size);
    const outside = new Float32Array(this.size);
    for (const layer of having) {
      const heads = headChoice === "mean" ? layer.heads.map((_, place) => place) : [headChoice];
      const factor = 1 / (having.length * heads.length);
      for (const head of heads) this.addMap(layer, head, kind, normalize, factor, weights, outside);
    }
    return { weights, outside, size: this.size, top: topOf(weights, this.size) };
  }
}

// Where colors are full: four rows of five have no larger weight. The first rows, with few keys, would drown the rest.
function topOf(weights, size) {
  const largest = Array.from({ length: size }, (_, row) => {
    let most = 0;
    for (let place = row * size; place <= row * size + row; place++) most = Math.max(most, Math.abs(weights[place]));
    return most;
  });
  return largest.sort((a, b) => a - b)[Math.floor(0.8 * (size - 1))] || 1;
}

// Indices of the weights of largest magnitude, largest first.
function topPlaces(weights, count) {
  return Array.from(weights.keys())
    .filter((place) => Math.abs(weights[place]) > 0)
    .sort((a, b) => Math.abs(weights[b]) - Math.abs(weights[a]))
    .slice(0, count);
}

const rowOf = (map, token) => map.weights.subarray(token * map.size, token * map.size + token + 1);

function columnOf(map, token) {
  return Float32Array.from({ length: map.size }, (_, row) => (row < token ? 0 : map.weights[row * map.size + token]));
}

// What each token gets in the mean of all rows.
function meanReceived(map) {
  const means = new Float32Array(map.size);
  for (let row = 0, place = 0; row < map.size; row++) {
    for (let key = 0; key < map.size; key++, place++) means[key] += map.weights[place] / map.size;
  }
  return means;
}

// A row's absolute weight in a span (first to last), as a share of all of it, weight outside the page included.
function shareOfSpan(map, token, [first, last]) {
  let inside = 0;
  let total = Math.abs(map.outside[token]);
  rowOf(map, token).forEach((weight, key) => {
    total += Math.abs(weight);
    if (key >= first && key <= last) inside += Math.abs(weight);
  });
  return total ? inside / total : 0;
}

// --- colors ---

const SCALES = {
  light: {
    positive: [[255, 255, 255], [190, 215, 240], [66, 133, 200], [8, 48, 107]],
    negative: [[255, 255, 255], [253, 208, 162], [230, 98, 20], [122, 36, 4]],
    masked: [236, 238, 241],
  },
  dark: {
    positive: [[16, 20, 27], [24, 62, 116], [64, 145, 240], [222, 238, 255]],
    negative: [[16, 20, 27], [110, 50, 12], [235, 125, 45], [255, 232, 208]],
    masked: [37, 42, 51],
  },
};

// Zero is the background, and each sign has its own hue; `share` is in [-1, 1].
function colorOf(share, hue, theme, contrast) {
  const stops = SCALES[theme][share < 0 ? "negative" : hue];
  const place = Math.min(1, Math.abs(share)) ** contrast * (stops.length - 1);
  const below = Math.min(stops.length - 2, Math.floor(place));
  const part = place - below;
  return stops[below].map((value, channel) => value + part * (stops[below + 1][channel] - value));
}

// A map's pixels: where tokens are smaller than pixels, the weight of largest magnitude under each pixel.
function paint(map, top, pixels, hue, theme, contrast) {
  const strongest = new Float32Array(pixels * pixels);
  const across = Math.max(pixels, map.size);
  for (let y = 0; y < across; y++) {
    const row = Math.floor((y * map.size) / across);
    const line = Math.floor((y * pixels) / across) * pixels;
    for (let x = 0; x < across; x++) {
      const key = Math.floor((x * map.size) / across);
      if (key > row) break;
      const weight = map.weights[row * map.size + key];
      const place = line + Math.floor((x * pixels) / across);
      if (Math.abs(weight) > Math.abs(strongest[place])) strongest[place] = weight;
    }
  }
  const steps = 255;
  const table = Array.from({ length: 2 * steps + 1 }, (_, i) => colorOf(i / steps - 1, hue, theme, contrast));
  const image = new ImageData(pixels, pixels);
  for (let y = 0, place = 0; y < pixels; y++) {
    const lastKey = Math.floor((y * map.size) / pixels);
    for (let x = 0; x < pixels; x++, place++) {
      const seen = Math.floor((x * map.size) / pixels) <= lastKey;
      const share = Math.max(-1, Math.min(1, strongest[place] / top));
      const color = seen ? table[Math.round((share + 1) * steps)] : SCALES[theme].masked;
      image.data.set(color, 4 * place);
      image.data[4 * place + 3] = 255;
    }
  }
  return image;
}
