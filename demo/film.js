// The steps of a drawing: of each image a tile with x_t above and, below it, the x_0 that the model predicts from it; a
// slider through the steps; and a closer look at one image, x_t and x_0 next to each other.
//   frame  {t, left, x_t, x_0, spread}: bytes of [B, C, H, W]; x_0 is null before the first step; t is -1 at the end
//   left   the factor of x_0 in x_t
export const UNSURE = 25; // grey levels; see `Spread` in sampler.js

export class Film {
  constructor(root) {
    root.append(document.querySelector("template#film").content.cloneNode(true));
    Object.assign(this, { root, frames: [], chosen: 0 });
    for (const name of ["caption", "progress", "tiles", "scrub", "play", "look"]) this[name] = root.querySelector(`.${name}`);
    const { play } = this;
    const slider = (this.slider = root.querySelector(".scrub input"));
    slider.oninput = () => {
      this.pause();
      this.held = Number(slider.value) < this.frames.length - 1; // new frames do not move a slider that is held back
      this.show(Number(slider.value));
    };
    play.onclick = () => (this.timer ? this.pause() : this.run());
    root.querySelector(".save-one").onclick = () => this.saveOne();
    root.querySelector(".save-all").onclick = () => this.saveAll();
    root.querySelector(".link").onclick = (event) => {
      event.preventDefault();
      const copied = () => (event.target.textContent = "Copied");
      navigator.clipboard?.writeText(event.target.href).then(copied, () => {}); // a browser may refuse
    };
  }

  // names: the label of each image, or null; steps: how many there will be; original: the bytes of what was written.
  begin({ names, shape, steps, file, link = null, original = null }) {
    this.pause();
    this.origin = original ? "your digit with noise" : "the noise it began with";
    Object.assign(this, { names, shape, steps, file, frames: [], held: false, state: "drawing" });
    this.chosen = Math.min(this.chosen, names.length - 1);
    this.root.dataset.state = "drawing";
    this.tiles.replaceChildren(...names.map((name, i) => this.makeTile(name, i)));
    if (original) this.tiles.prepend(this.makeOriginal(original));
    this.scrub.hidden = this.look.hidden = true;
    this.progress.firstElementChild.style.width = 0;
    const anchor = this.root.querySelector(".link");
    Object.assign(anchor, { hidden: !link, href: link ?? "#", textContent: "Copy the link" });
  }

  say(words) {
    this.caption.textContent = words;
  }

  makeTile(name, i) {
    const make = (kind, more) => Object.assign(document.createElement(kind), more);
    const tile = make("button", { type: "button", className: "tile waiting", title: "The bar: how sure the model is" });
    const bar = make("span", { className: "bar" });
    bar.append(make("span"));
    tile.append(this.makeCanvas(), this.makeCanvas(), bar);
    tile.append(make("span", { className: "name", textContent: name ?? "\u00a0" }));
    tile.setAttribute("aria-label", `Image ${i + 1}${name ? `, a ${name}` : ""}: look closer`);
    tile.onclick = () => {
      this.chosen = i;
      this.show(Number(this.slider.value));
    };
    return tile;
  }

  makeOriginal(bytes) {
    const tile = Object.assign(document.createElement("div"), { className: "original" });
    tile.append(this.makeCanvas(), "yours, as MNIST");
    put(tile.firstChild, bytes, 0, this.shape);
    return tile;
  }

  makeCanvas() {
    const [, height, width] = this.shape;
    return Object.assign(document.createElement("canvas"), { width, height });
  }

  add(frame) {
    if (this.taken() === 0) this.frames = []; // the noise alone, of the same t
    this.frames.push(frame);
    this.slider.max = this.frames.length - 1;
    this.scrub.hidden = this.look.hidden = false;
    this.progress.firstElementChild.style.width = `${(100 * this.taken()) / this.steps}%`;
    if (!this.held) this.show(this.frames.length - 1);
  }

  // How many steps have been taken.
  taken() {
    return Math.min(this.steps, this.frames.filter((frame) => frame.x_0).length);
  }

  // state: "done", "stopped" or "failed"; words: what the caption says first from now on.
  finish(state, words) {
    this.state = this.root.dataset.state = state;
    this.ending = words;
    if (this.frames.length) this.show(Number(this.slider.value));
    else this.say(words);
  }

  show(index) {
    const frame = this.frames[index];
    if (!frame) return;
    const done = frame.t < 0;
    const above = done ? this.frames[0].x_t : frame.x_t; // at the end, x_t is x_0: show where it came from instead
    this.slider.value = index;
    [...this.tiles.querySelectorAll(".tile")].forEach((tile, i) => this.fill(tile, i, above, frame, index));
    const [x_t, x_0] = this.look.querySelectorAll("figure");
    this.fillFigure(x_t, above, done ? this.origin : `xₜ at t = ${frame.t}`);
    this.fillFigure(x_0, frame.x_0, done ? "the picture" : "the x₀ predicted from it");
    this.describe(frame, index);
  }

  // Whether nearly all steps are taken: before, every x_0 moves much.
  settled(index) {
    return index + 1 >= 0.9 * this.steps;
  }

  fill(tile, i, above, frame, index) {
    const [top, bottom, bar, name] = tile.children;
    put(top, above, i, this.shape);
    if (frame.x_0) put(bottom, frame.x_0, i, this.shape);
    tile.classList.toggle("waiting", !frame.x_0);
    tile.setAttribute("aria-pressed", i === this.chosen);
    const spread = frame.spread?.[i]; // undefined at the first step
    bar.firstChild.style.width = `${Math.max(0, 100 - (50 * (spread ?? Infinity)) / UNSURE)}%`; // the longer, the surer
    const unsure = this.settled(index) && spread > UNSURE;
    tile.classList.toggle("unsure", unsure);
    name.textContent = [this.names[i], unsure && "unsure"].filter(Boolean).join(" ") || "\u00a0";
  }

  fillFigure(figure, images, words) {
    const canvas = figure.querySelector("canvas");
    const [, height, width] = this.shape;
    if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
    canvas.classList.toggle("waiting", !images);
    if (images) put(canvas, images, this.chosen, this.shape);
    canvas.setAttribute("aria-label", words);
    figure.querySelector("figcaption").textContent = words;
  }

  // The words under and beside the pictures.
  describe(frame, index) {
    const words = frame.t < 0 ? "Slide back to see them." : `t = ${frame.t}: xₜ above, the x₀ predicted from it below.`;
    this.say(this.state === "drawing" ? `Step ${index + 1} of ${this.steps}, ${words}` : `${this.ending} ${words}`);
    this.slider.setAttribute("aria-valuetext", words);
    const write = (name, text) => (this.look.querySelector(name).textContent = text);
    const name = this.names[this.chosen];
    write(".which", `Image ${this.chosen + 1} of ${this.names.length}${name ? `: ${name}` : ""}`);
    const [left, right] = [frame.left, Math.sqrt(1 - frame.left ** 2)].map((share) => share.toFixed(2));
    write(".share", frame.t < 0 ? "" : `xₜ = ${left} x₀ + ${right} ε`);
    const spread = frame.spread?.[this.chosen];
    write(".sureness", spread === undefined ? "" : this.sureness(spread, index));
  }

  sureness(spread, index) {
    const steps = Math.ceil(Math.min(index + 1, this.steps / 2));
    const moved = `In the last ${steps} steps its x₀ moved by ${spread.toFixed(0)} of 255 grey levels`;
    if (!this.settled(index)) return `${moved}. The less it moves, the surer the model.`;
    if (spread <= UNSURE) return `${moved}, which is no more than usual.`;
    return `${moved}, which is much: such images are malformed more often than others.`;
  }

  run() {
    this.held = true;
    if (this.slider.value === this.slider.max) this.show(0);
    this.play.textContent = "❚❚";
    this.play.setAttribute("aria-label", "Pause");
    this.timer = setInterval(() => {
      this.show(Number(this.slider.value) + 1);
      if (this.slider.value === this.slider.max) this.pause();
    }, 100);
  }

  pause() {
    clearInterval(this.timer);
    this.timer = null;
    this.play.textContent = "▶";
    this.play.setAttribute("aria-label", "Play the steps");
  }

  saveOne() {
    save(this.look.querySelectorAll("canvas")[1], `${this.file}-${this.chosen}.png`);
  }

  // All images side by side as they are now, enlarged four times: x_t above the predicted x_0, or at the end x_0 alone.
  saveAll() {
    const [, height, width] = this.shape;
    const columns = Math.min(this.names.length, 10);
    const done = this.frames[this.slider.value].t < 0;
    const rows = done ? 1 : 2;
    const sheet = Object.assign(document.createElement("canvas"), {
      width: 4 * width * columns,
      height: 4 * height * rows * Math.ceil(this.names.length / columns),
    });
    const context = sheet.getContext("2d");
    context.imageSmoothingEnabled = false;
    [...this.tiles.querySelectorAll(".tile")].forEach((tile, i) => {
      [...tile.querySelectorAll("canvas")].slice(2 - rows).forEach((canvas, row) => {
        const top = rows * Math.floor(i / columns) + row;
        context.drawImage(canvas, 4 * width * (i % columns), 4 * height * top, 4 * width, 4 * height);
      });
    });
    save(sheet, `${this.file}.png`);
  }
}

// Image i of the bytes of [B, C, H, W], grey or in colours.
export function put(canvas, bytes, i, [channels, height, width]) {
  const area = height * width;
  const image = new ImageData(width, height);
  for (let pixel = 0; pixel < area; pixel++) {
    for (let c = 0; c < 3; c++) image.data[4 * pixel + c] = bytes[(i * channels + (channels === 3 ? c : 0)) * area + pixel];
    image.data[4 * pixel + 3] = 255;
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
}

function save(canvas, name) {
  Object.assign(document.createElement("a"), { href: canvas.toDataURL("image/png"), download: name }).click();
}
