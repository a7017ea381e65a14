// The map's canvas, choices that concern the whole page, and the keyboard.

function labelStep(size, room) {
  return [1, 2, 5, 10, 20, 25, 50, 100, 200, 500].find((step) => size / step <= room) ?? 1000;
}

function drawMap(panel) {
  const { canvas, model } = panel;
  const scale = window.devicePixelRatio || 1;
  const width = canvas.parentNode.clientWidth;
  const cell = (width - 76) / model.size;
  panel.margin = cell >= 10 ? 76 : 34;
  const side = Math.round((width - panel.margin) * scale);
  for (const layer of [canvas, panel.overlay]) {
    layer.width = layer.height = Math.round(width * scale);
    layer.style.height = `${width}px`;
  }
  const context = canvas.getContext("2d");
  const style = getComputedStyle(document.documentElement);
  context.fillStyle = style.getPropertyValue("--ground");
  context.fillRect(0, 0, canvas.width, canvas.height);
  const corner = Math.round(panel.margin * scale);
  context.putImageData(paint(panel.map, panel.top, side, panel.hue(), theme, state.contrast), corner, corner);
  context.scale(scale, scale);
  drawLabels(panel, context, width, style.getPropertyValue("--quiet"));
  canvas.setAttribute("aria-label", `attention map, ${model.name}, layer ${panel.layerSelect.selectedOptions[0].text}, head ` +
    `${panel.headSelect.selectedOptions[0].text}, ${panel.shownKind}: ${model.size} tokens`);
}

function drawLabels(panel, context, width, color) {
  const { model, margin } = panel;
  const cell = (width - margin) / model.size;
  const words = margin > 40;
  const step = words ? Math.ceil(11 / cell) : labelStep(model.size, (width - margin) / 40);
  context.font = words ? '11px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace' : "11px system-ui, sans-serif";
  context.fillStyle = color;
  context.textBaseline = "middle";
  for (let place = 0; place < model.size; place += step) {
    const middle = margin + (place + 0.5) * cell;
    if (!words && middle > width - 14) break;
    const full = words ? wordOf(model.tokens[place]) : String(place + model.start);
    const text = full.length > 10 ? `${full.slice(0, 9)}…` : full;
    context.textAlign = "right";
    context.fillText(text, margin - 5, middle);
    context.save();
    context.translate(middle, margin - 5);
    if (words) context.rotate(-Math.PI / 2);
    context.textAlign = words ? "left" : "center";
    context.fillText(text, 0, words ? 0 : -4);
    context.restore();
  }
}

function drawCross(panel, token) {
  const { overlay, model, margin } = panel;
  const context = overlay.getContext("2d");
  const scale = window.devicePixelRatio || 1;
  context.setTransform(scale, 0, 0, scale, 0, 0);
  const width = overlay.width / scale;
  context.clearRect(0, 0, width, width);
  const cell = (width - margin) / model.size;
  const style = getComputedStyle(document.documentElement);
  const frame = (color, x, y, w, h) => {
    context.strokeStyle = style.getPropertyValue(color);
    context.lineWidth = 1.5;
    context.strokeRect(x, y, w, h);
  };
  if (state.mark) {
    const [first, last] = state.mark;
    const top = margin + first * cell;
    frame("--mark", top, top, (last - first + 1) * cell, width - top);
  }
  if (token === null) return;
  const place = margin + token * cell;
  frame("--accent", margin, place, (token + 1) * cell, cell);
  frame("--accent", place, place, cell, width - place);
}

function drawLegend() {
  const signed = panels.some((panel) => panel.shownKind === "difference");
  const hues = signed ? ["positive"] : [...new Set(panels.map((panel) => panel.hue()))];
  const bars = hues.map((hue) => {
    const canvas = element("canvas", { width: 160, height: 1 });
    const context = canvas.getContext("2d");
    for (let x = 0; x < 160; x++) {
      const share = signed ? (2 * x) / 159 - 1 : x / 159;
      context.fillStyle = css(colorOf(share, hue, theme, state.contrast));
      context.fillRect(x, 0, 1, 1);
    }
    return canvas;
  });
  const top = [...new Set(panels.map((panel) => number(panel.top)))].join(" | ");
  const bar = element("div", { class: signed ? "bar zero" : "bar" }, ...bars);
  document.getElementById("legend").replaceChildren(signed ? `≤ −${top}` : "0", bar, `≥ ${top}`);
}

const placeOf = (value) => (value === "mean" ? "mean" : Number(value));
const inMark = (place) => state.mark && place >= state.mark[0] && place <= state.mark[1];

async function recompute(some = panels) {
  await Promise.all(some.map((panel) => panel.compute()));
  if (!panels.every((panel) => panel.map)) return;
  const common = state.linked ? Math.max(...panels.map((panel) => panel.map.top)) : null;
  for (const panel of panels) panel.top = common ?? panel.map.top;
  render(true);
  drawLegend();
  document.documentElement.dataset.ready = "true";
}

// The place of the layer with a number, or nearest to it where a page holds not all of them.
function nearestLayer(model, wanted) {
  const distances = model.layers.map(({ layer }) => Math.abs(layer - wanted));
  return distances.indexOf(Math.min(...distances));
}

function choose(panel, choice) {
  active = panel;
  const changed = state.linked ? panels : [panel];
  for (const one of changed) {
    const { layer, head, kind } = choice;
    if (layer !== undefined) one.layer = layer === "mean" ? layer : nearestLayer(one.model, panel.model.layers[layer].layer);
    if (head !== undefined) one.head = head;
    if (kind !== undefined) one.kind = kind;
  }
  recompute(changed);
}

function render(maps) {
  for (const panel of panels) {
    if (maps) panel.draw();
    else panel.drawFocus();
  }
}

function focusToken(token) {
  if (token === state.token && token !== null && !panels.some((panel) => panel.key != null)) return;
  state.token = token;
  if (shared || panels.length === 1) render(false);
  else (active ?? panels[0]).drawFocus();
}

function hold(token) {
  state.held = !(state.held && state.token === token);
  focusToken(token);
  render(false);
}

function move(token) {
  const panel = active ?? panels[0];
  for (const one of panels) one.key = null;
  state.held = true;
  focusToken(Math.max(0, Math.min(panel.model.size - 1, token)));
  for (const one of panels) scrollTo(one, state.token);
}

function scrollTo(panel, token) {
  const span = panel.spans[token];
  if (!span) return;
  const { offsetTop, offsetHeight } = span;
  const box = panel.tokens;
  if (offsetTop < box.scrollTop) box.scrollTop = offsetTop - 8;
  else if (offsetTop + offsetHeight > box.scrollTop + box.clientHeight) {
    box.scrollTop = offsetTop + offsetHeight - box.clientHeight + 8;
  }
}

function step(panel, name, count, by) {
  const order = [...Array(count).keys(), "mean"];
  const place = (order.indexOf(panel[name]) + by + order.length) % order.length;
  choose(panel, { [name]: order[place] });
}

function markHere() {
  if (state.token === null) return;
  if (state.marking === null) {
    state.marking = state.token;
    state.mark = [state.token, state.token];
  } else {
    state.mark = [Math.min(state.marking, state.token), Math.max(state.marking, state.token)];
    state.marking = null;
  }
  render(false);
}

function letGo() {
  if (state.token === null && !state.held) state.mark = null;
  Object.assign(state, { held: false, marking: null });
  focusToken(null);
  render(false);
}

function setTheme(chosen) {
  theme = chosen;
  document.documentElement.dataset.theme = theme;
  document.getElementById("theme").textContent = theme === "dark" ? "light" : "dark";
  if (!panels.every((panel) => panel.map)) return;
  panels.forEach((panel) => panel.drawGrid());
  render(true);
  drawLegend();
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("select")) return;
  const panel = active ?? panels[0];
  const token = state.token ?? -1;
  const heads = panel.headSelect.options.length - 1;
  const actions = {
    ArrowLeft: () => move(token - 1),
    ArrowRight: () => move(token + 1),
    Home: () => move(0),
    End: () => move(panel.model.size - 1),
    j: () => step(panel, "layer", panel.model.layers.length, 1),
    k: () => step(panel, "layer", panel.model.layers.length, -1),
    n: () => step(panel, "head", heads, 1),
    p: () => step(panel, "head", heads, -1),
    0: () => choose(panel, { head: "mean" }),
    1: () => choose(panel, { kind: "positive" }),
    2: () => choose(panel, { kind: "negative" }),
    3: () => choose(panel, { kind: "difference" }),
    m: markHere,
    t: () => setTheme(theme === "dark" ? "light" : "dark"),
    Escape: letGo,
  };
  if (!actions[event.key]) return;
  event.preventDefault();
  actions[event.key]();
}

function begin() {
  const main = document.getElementById("panels");
  data.models.forEach((model, index) => panels.push(new Panel(model, index)));
  for (const panel of panels) panel.layer = nearestLayer(panel.model, panels[0].model.layers[panels[0].layer].layer);
  main.className = panels.length > 1 ? "two" : "one";
  main.append(...panels.map((panel) => panel.node));
  document.getElementById("quantization").textContent = data.quantization;
  const notes = data.models.flatMap((model) => model.leftOut.map((note) => `${model.name}: ${note}`));
  if (notes.length) document.getElementById("left-out").append(element("p", {}, element("b", {}, "Left out. "), notes.join(" ")));
  document.getElementById("link-label").hidden = panels.length === 1;
  document.getElementById("link").onchange = ({ target }) => { state.linked = target.checked; recompute(); };
  document.getElementById("normalize").onchange = ({ target }) => { state.normalize = target.checked; recompute(); };
  document.getElementById("contrast").onchange = ({ target }) => { state.contrast = Number(target.value); recompute(); };
  document.getElementById("theme").onclick = () => setTheme(theme === "dark" ? "light" : "dark");
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", ({ matches }) => setTheme(matches ? "dark" : "light"));
  document.addEventListener("keydown", onKey);
  addEventListener("resize", () => render(true));
  setTheme(theme);
  recompute();
}

begin();
