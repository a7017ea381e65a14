// What the page shows and how it is used. A panel is one model; tokens are counted from the first shown.

const data = JSON.parse(document.getElementById("data").textContent);
const state = { token: null, held: false, mark: data.mark, marking: null, normalize: false, contrast: 0.5, linked: true };
const KINDS = ["positive", "negative", "difference"];
const panels = [];
let theme = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
let active = null;

function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name in node && typeof value !== "string") node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

const visible = (token) => token.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll("\r", "␍");
const wordOf = (token) => visible(token).replace(/^ (?=[^ ])/, "").replace(/ {2,}/g, (run) => `␣${run.length}`).replace(/^ $/, "␣");
const number = (weight) => (weight <= -0.00005 ? "−" : "") + Math.abs(weight).toFixed(Math.abs(weight) < 0.0995 ? 4 : 3);
const css = (color) => `rgb(${color.map(Math.round).join()})`;
const shared = panelsAlike(data.models);

function panelsAlike(models) {
  return models.length > 1 && models[0].tokens.join("\0") === models[1].tokens.join("\0");
}

class Panel {
  constructor(model, index) {
    this.model = new Model(model);
    this.layer = Math.floor(model.layers.length / 2);
    this.head = "mean";
    this.kind = model.layers.some((layer) => layer.differential) ? "difference" : "positive";
    this.version = 0;
    this.build(index);
  }

  build(index) {
    const { model } = this;
    this.layerSelect = element("select", { "aria-label": "layer" });
    model.layers.forEach((layer, place) => this.layerSelect.append(new Option(layer.layer, place)));
    this.layerSelect.append(new Option("mean", "mean"));
    this.headSelect = element("select", { "aria-label": "head" });
    this.layerSelect.onchange = () => choose(this, { layer: placeOf(this.layerSelect.value) });
    this.headSelect.onchange = () => choose(this, { head: placeOf(this.headSelect.value) });
    this.kindButtons = KINDS.map((kind) => {
      const button = element("button", { type: "button" });
      button.onclick = () => choose(this, { kind });
      return button;
    });
    this.canvas = element("canvas", { tabindex: "0", role: "img" });
    this.overlay = element("canvas");
    this.readout = element("output", { "aria-live": "polite" });
    this.tokens = element("div", { class: "tokens", role: "listbox", tabindex: "0", "aria-label": "tokens" });
    this.spans = model.tokens.map((token, place) => this.tokenSpan(token, `token-${index}-${place}`));
    this.tokens.append(...this.spans);
    this.given = element("ol");
    this.received = element("ol");
    this.grid = element("div", { class: "grid" });
    this.headsTitle = element("h3");
    this.stripTitle = element("h3");
    this.givenTitle = element("h3");
    this.receivedTitle = element("h3");
    this.node = element("section", { class: "panel", "aria-label": model.name },
      element("div", { class: "bar" }, element("h2", { title: model.name }, model.name),
        element("label", {}, "layer ", this.layerSelect), element("label", {}, "head ", this.headSelect),
        element("div", { class: "kinds", role: "group", "aria-label": "map" }, ...this.kindButtons)),
      element("div", {}, element("div", { class: "map" }, this.canvas, this.overlay), this.readout),
      element("div", { class: "strip" }, this.stripTitle, this.tokens),
      element("div", { class: "lists" }, element("div", {}, this.givenTitle, this.given),
        element("div", {}, this.receivedTitle, this.received)),
      element("div", { class: "heads" }, this.headsTitle, this.grid));
    this.node.children[1].style.gridArea = "map";
    this.node.onpointerenter = () => { active = this; };
    this.node.addEventListener("focusin", () => { active = this; });
    this.listen();
  }

  tokenSpan(token, id) {
    const span = element("span", { role: "option", id, "aria-selected": "false" });
    const parts = token.split("\n");
    parts.forEach((part, place) => {
      if (place) span.append(element("i", {}, "⏎"), "\n");
      span.append(part.replaceAll("\t", "⇥"));
    });
    return span;
  }

  listen() {
    this.tokens.onpointerover = ({ target }) => {
      const place = this.spans.indexOf(target.closest("span"));
      if (place >= 0 && !state.held) focusToken(place);
    };
    this.tokens.onclick = ({ target }) => {
      const place = this.spans.indexOf(target.closest("span"));
      if (place >= 0) hold(place);
    };
    this.tokens.onpointerleave = () => { if (!state.held) focusToken(null); };
    this.canvas.onpointermove = (event) => this.point(event);
    this.canvas.onpointerleave = () => { this.key = null; if (state.held) render(false); else focusToken(null); };
    this.canvas.onclick = () => { if (this.pointed !== undefined) hold(this.pointed); };
  }

  point(event) {
    const box = this.canvas.getBoundingClientRect();
    const place = (offset) => Math.floor(((offset - this.margin) / (box.width - this.margin)) * this.model.size);
    const row = place(event.clientY - box.top);
    const key = place(event.clientX - box.left);
    if (row < 0 || key < 0 || row >= this.model.size || key > row) return;
    this.pointed = row;
    this.key = key;
    if (state.held) render(false);
    else focusToken(row);
  }

  layersChosen() {
    return this.layer === "mean" ? this.model.layers : [this.model.layers[this.layer]];
  }

  fillControls() {
    const layers = this.layersChosen();
    const heads = layers.reduce((most, layer) => (layer.heads.length > most.length ? layer.heads : most), []);
    if (this.head !== "mean" && this.head >= heads.length) this.head = "mean";
    this.headSelect.replaceChildren(...heads.map((head, place) => new Option(head, place)), new Option("mean", "mean"));
    this.layerSelect.value = this.layer;
    this.headSelect.value = this.head;
    const subtracts = layers.every((layer) => layer.differential);
    this.shownKind = subtracts ? this.kind : "positive";
    const names = subtracts ? ["A₁", "A₂", "A₁ − λA₂"] : ["A", "A₂", "A₁ − λA₂"];
    const titles = ["positive map", "negative map", "difference, diverging from zero"];
    this.kindButtons.forEach((button, place) => {
      button.textContent = names[place];
      button.title = titles[place];
      button.disabled = !subtracts && place > 0;
      button.setAttribute("aria-pressed", KINDS[place] === this.shownKind);
    });
  }

  async compute() {
    this.fillControls();
    const version = ++this.version;
    const map = await this.model.map(this.layer, this.head, this.shownKind, state.normalize);
    const heads = await Promise.all([...this.headSelect.options].slice(0, -1).map((_, place) =>
      this.model.map(this.layer, place, this.shownKind, state.normalize)));
    if (version !== this.version) return;
    Object.assign(this, { map, headMaps: heads, means: meanReceived(map) });
    this.top = map.top;
    this.drawGrid();
  }

  hue() {
    return this.shownKind === "negative" ? "negative" : "positive";
  }

  draw() {
    if (!this.map) return;
    drawMap(this);
    this.drawFocus();
  }

  drawGrid() {
    const scale = window.devicePixelRatio || 1;
    this.headsTitle.textContent = `Heads of ${this.layer === "mean" ? "all layers" : `layer ${this.layersChosen()[0].layer}`}`;
    const buttons = this.headMaps.map((map, place) => {
      const pixels = Math.round((panels.length > 1 ? 61 : 72) * scale);
      const canvas = element("canvas", { width: pixels, height: pixels });
      canvas.getContext("2d").putImageData(paint(map, map.top, pixels, this.hue(), theme, state.contrast), 0, 0);
      const name = this.headSelect.options[place].text;
      const button = element("button", { type: "button", title: `head ${name}`, "aria-label": `head ${name}` }, canvas,
        element("span", {}, name));
      button.setAttribute("aria-pressed", this.head === place);
      button.onclick = () => choose(this, { head: this.head === place ? "mean" : place });
      return button;
    });
    const focused = [...this.grid.children].indexOf(document.activeElement);
    this.grid.replaceChildren(...buttons);
    if (focused >= 0) buttons[Math.min(focused, buttons.length - 1)]?.focus();
  }

  drawFocus() {
    if (!this.map) return;
    const token = state.token === null || state.token >= this.model.size ? null : state.token;
    const row = token === null ? null : rowOf(this.map, token);
    const column = token === null ? this.means : columnOf(this.map, token);
    const top = token === null ? Math.max(...this.means.map(Math.abs)) : this.top;
    this.spans.forEach((span, place) => {
      const weight = token !== null && place <= token ? row[place] : column[place];
      const color = colorOf(weight / top, this.hue(), theme, state.contrast);
      span.style.backgroundColor = css(color);
      span.style.color = color[0] * 0.3 + color[1] * 0.59 + color[2] * 0.11 > 130 ? "#14181f" : "#f4f6f8";
      span.className = (place === token ? "focus" : "") + (inMark(place) ? " marked" : "");
      span.setAttribute("aria-selected", place === token);
    });
    if (token === null) this.tokens.removeAttribute("aria-activedescendant");
    else this.tokens.setAttribute("aria-activedescendant", this.spans[token].id);
    this.drawLists(token, row, column);
    this.drawReadout(token);
    this.drawShares(token);
    drawCross(this, token);
  }

  drawLists(token, row, column) {
    const name = token === null ? "" : `“${wordOf(this.model.tokens[token])}”`;
    this.stripTitle.textContent = token === null ? "Tokens, by what they get in the mean of all rows"
      : `${name} — before it: what it attends to; after it: what attends to it`;
    this.givenTitle.textContent = token === null ? "Attended to most" : `${name} attends to`;
    this.receivedTitle.textContent = token === null ? "and then to" : `Attend to ${name}`;
    const length = panels.length > 1 ? 7 : 8;
    this.fill(this.given, token === null ? this.means : row, 0, length);
    // Without a token the second list goes on where the first one ends.
    this.fill(this.received, token === null ? this.means : column, token === null ? length : 0, length);
  }

  fill(list, weights, skipped, length) {
    const ranked = topPlaces(weights, skipped + length);
    const places = ranked.slice(skipped);
    const longest = Math.max(...ranked.map((place) => Math.abs(weights[place])), 1e-9);
    list.replaceChildren(...places.map((place) => {
      const bar = element("div");
      bar.style.width = `${(100 * Math.abs(weights[place])) / longest}%`;
      bar.style.background = css(colorOf(weights[place] < 0 ? -0.45 : 0.45, this.hue(), theme, 0.5));
      return element("li", {}, element("span", { class: "word" }, wordOf(this.model.tokens[place]),
        element("span", { class: "place" }, ` ${place + this.model.start}`)),
      element("div", { class: "length" }, bar), element("span", { class: "number" }, number(weights[place])));
    }));
  }

  drawReadout(token) {
    if (token === null) {
      this.readout.replaceChildren("Point at a token or a cell, or use the arrow keys.");
      return;
    }
    const { tokens, start } = this.model;
    const key = this.key ?? topPlaces(rowOf(this.map, token), 1)[0] ?? 0;
    const parts = [element("b", {}, wordOf(tokens[token])), ` ${token + start} → `, element("b", {}, wordOf(tokens[key])),
      ` ${key + start}: `, element("b", {}, number(this.map.weights[token * this.model.size + key]))];
    const lambda = this.lambdaAt(token);
    if (lambda !== null) parts.push(` · λ ${lambda.toFixed(3)}`);
    if (start) parts.push(` · outside the page ${number(this.map.outside[token])}`);
    if (state.mark) {
      const share = 100 * shareOfSpan(this.map, token, state.mark);
      parts.push(" · ", element("span", { class: "share" }, `marked ${share.toFixed(1)} %`), `, else ${(100 - share).toFixed(1)} %`);
    }
    this.readout.replaceChildren(...parts);
  }

  lambdaAt(token) {
    const layer = this.layer === "mean" ? null : this.model.layers[this.layer];
    if (!layer?.differential || this.head === "mean") return null;
    if (!this.lambdas || this.lambdas.layer !== layer) {
      this.model.layerAt(this.layer).then(({ lambda }) => { this.lambdas = { layer, lambda }; this.drawFocus(); });
      return null;
    }
    return this.lambdas.lambda[this.head * this.model.size + token];
  }

  drawShares(token) {
    [...this.grid.children].forEach((button, place) => {
      const label = button.lastChild;
      const name = this.headSelect.options[place].text;
      if (!state.mark || token === null) label.replaceChildren(name);
      else {
        const share = shareOfSpan(this.headMaps[place], token, state.mark);
        label.replaceChildren(`${name}: `, element("span", { class: "share" }, `${Math.round(100 * share)} %`));
      }
    });
  }
}
