// A square to write on, by finger, pen, mouse or keyboard.
const PEN_WIDTH = 24; // of 280: about what a pen leaves in MNIST
const MOVES = { ArrowLeft: [-8, 0], ArrowRight: [8, 0], ArrowUp: [0, -8], ArrowDown: [0, 8] };

export class Pad {
  constructor(root) {
    this.canvas = root.querySelector("canvas");
    this.ring = root.querySelector(".ring"); // where the keyboard's pen is; no part of the drawing
    this.context = this.canvas.getContext("2d", { willReadFrequently: true });
    this.clear();
    this.canvas.onpointerdown = (event) => {
      event.preventDefault();
      this.canvas.focus({ preventScroll: true });
      this.canvas.setPointerCapture(event.pointerId);
      this.ring.hidden = true;
      [this.x, this.y] = this.place(event);
      this.down = true;
      this.line(this.x, this.y);
    };
    this.canvas.onpointermove = (event) => {
      if (this.down && event.buttons) this.line(...this.place(event));
    };
    this.canvas.onpointerup = this.canvas.onpointercancel = () => (this.down = false);
    this.canvas.onkeydown = (event) => this.onKey(event);
    this.canvas.onblur = () => {
      this.down = false;
      this.ring.hidden = true;
    };
  }

  clear() {
    this.context.fillStyle = "black";
    this.context.fillRect(0, 0, this.canvas.width, this.canvas.height);
    Object.assign(this, { x: 140, y: 140, down: false });
  }

  line(x, y) {
    Object.assign(this.context, { strokeStyle: "white", lineWidth: PEN_WIDTH, lineCap: "round", lineJoin: "round" });
    this.context.beginPath();
    this.context.moveTo(this.x, this.y);
    this.context.lineTo(x, y);
    this.context.stroke();
    Object.assign(this, { x, y });
  }

  place(event) {
    const box = this.canvas.getBoundingClientRect();
    const [across, down] = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
    return [across * this.canvas.width, down * this.canvas.height];
  }

  onKey(event) {
    if (event.key === " ") {
      this.down = !this.down;
      if (this.down) this.line(this.x, this.y);
    } else if (MOVES[event.key]) {
      const within = (value) => Math.max(PEN_WIDTH / 2, Math.min(this.canvas.width - PEN_WIDTH / 2, value));
      const [x, y] = [within(this.x + MOVES[event.key][0]), within(this.y + MOVES[event.key][1])];
      if (this.down) this.line(x, y);
      else Object.assign(this, { x, y });
    } else return;
    event.preventDefault();
    const percent = (value) => `${(100 * value) / this.canvas.width}%`;
    Object.assign(this.ring.style, { left: percent(this.x), top: percent(this.y) });
    this.ring.classList.toggle("down", this.down);
    this.ring.hidden = false;
  }

  // What is written, in 0 ... 1, as `asMnist` gives it; null if nothing is.
  read(size) {
    const { data, width, height } = this.context.getImageData(0, 0, this.canvas.width, this.canvas.height);
    return asMnist(Float32Array.from({ length: width * height }, (_, i) => data[4 * i] / 255), width, size);
  }
}

// A drawing [side, side], scaled and centred as MNIST's digits are: its longer side becomes 20 of 28 pixels, and its
// centre of mass the centre of the image (http://yann.lecun.com/exdb/mnist/). -> [size, size]; null: nothing is drawn.
export function asMnist(drawing, side, size) {
  let [left, top, right, bottom, mass, across, down] = [side, side, 0, 0, 0, 0, 0];
  drawing.forEach((value, i) => {
    if (!value) return;
    const [x, y] = [i % side, Math.floor(i / side)];
    [left, right] = [Math.min(left, x), Math.max(right, x + 1)];
    [top, bottom] = [Math.min(top, y), Math.max(bottom, y + 1)];
    [mass, across, down] = [mass + value, across + value * (x + 0.5), down + value * (y + 0.5)];
  });
  if (!mass) return null;
  const scale = ((20 / 28) * size) / Math.max(right - left, bottom - top); // pixels of the image for one of the drawing
  const shift = (first, sum) => Math.round(size / 2 - scale * (sum / mass - first)) - scale * first;
  const [shiftX, shiftY] = [shift(left, across), shift(top, down)];
  const image = new Float32Array(size * size);
  drawing.forEach((value, i) => {
    if (!value) return;
    // each pixel of the drawing is spread over the pixels of the image that it covers
    const [x, y] = [scale * (i % side) + shiftX, scale * Math.floor(i / side) + shiftY];
    for (let row = Math.floor(y); row < y + scale; row++) {
      for (let column = Math.floor(x); column < x + scale; column++) {
        if (row < 0 || column < 0 || row >= size || column >= size) continue;
        const overlap = (from, at) => Math.max(0, Math.min(from + scale, at + 1) - Math.max(from, at));
        image[row * size + column] += value * overlap(x, column) * overlap(y, row);
      }
    }
  });
  return image.map((value) => Math.min(1, value));
}
