// Two videos in step, and their difference: the one before leads, the one after and the difference follow.

export const SMALL = 160; // pixels; narrower pictures are shown with square pixels
const CATCH_UP = 4; // change of the follower's speed by a second that it is behind

const $ = (id) => document.getElementById(id);
const before = $("before");
const after = $("after");
const canvas = $("difference");
const controls = ["play", "seek", "gain"].map($);
const shown = new Map(); // media time of the picture that each of both shows, in seconds
let frames = 0;
let playing = false;

/** Shows two mp4 files in base64, which have the same number of frames and the same size, and offers the second as a
 * download of that name. They play at once, unless the user prefers less motion. */
export function load(first, second, count, name) {
  frames = count;
  before.src = address(first);
  after.src = address(second);
  $("download").href = after.src;
  $("download").download = name;
  $("download").removeAttribute("aria-disabled");
}

/** Shows nothing. */
export function unload() {
  play(false);
  shown.clear();
  for (const video of [before, after]) {
    URL.revokeObjectURL(video.src);
    video.removeAttribute("src");
    video.load();
  }
  canvas.getContext("2d").clearRect(0, 0, canvas.width, canvas.height);
  $("download").removeAttribute("href");
  $("download").setAttribute("aria-disabled", "true");
  for (const control of controls) control.disabled = true;
  $("seek").value = 0;
  $("time").textContent = "no video";
}

function address(base64) {
  const text = atob(base64);
  const data = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) data[i] = text.charCodeAt(i);
  return URL.createObjectURL(new Blob([data], { type: "video/mp4" }));
}

function loaded() {
  const ready = Math.min(before.readyState, after.readyState) >= HTMLMediaElement.HAVE_CURRENT_DATA;
  if (!ready || !$("play").disabled) return;
  canvas.width = before.videoWidth;
  canvas.height = before.videoHeight;
  for (const frame of $("player").querySelectorAll(".frame")) frame.classList.toggle("pixels", canvas.width < SMALL);
  for (const control of controls) control.disabled = false;
  $("seek").max = frames - 1;
  goTo(0);
  play(!matchMedia("(prefers-reduced-motion: reduce)").matches);
}

const frameLength = () => before.duration / frames;
const frameShown = () => Math.min(frames - 1, Math.round((shown.get(before) ?? 0) / frameLength()));

function goTo(frame) {
  const inside = Math.min(frames - 1, Math.max(0, frame));
  for (const video of [before, after]) video.currentTime = (inside + 0.5) * frameLength(); // amid the frame
}

function play(on) {
  const stops = playing && !on;
  playing = on;
  $("play").textContent = on ? "Pause" : "Play";
  if (on && before.ended) goTo(0);
  for (const video of [before, after]) {
    if (on) video.play().catch(() => {}); // a pause that comes first refuses it
    else video.pause();
  }
  if (stops) goTo(frameShown());
}

function step(count) {
  const from = playing ? frameShown() : Number($("seek").value);
  play(false);
  goTo(from + count);
}

function pictureShown(video, mediaTime) {
  shown.set(video, mediaTime);
  if (video === before) {
    $("seek").value = frameShown();
    $("time").textContent = `${frameShown() + 1} / ${frames}, ${mediaTime.toFixed(2)} s`;
    $("seek").setAttribute("aria-valuetext", `frame ${frameShown() + 1} of ${frames}`);
  } else {
    const behind = before.currentTime - after.currentTime;
    const near = !playing || Math.abs(behind) < frameLength() / 4;
    after.playbackRate = near ? 1 : Math.min(2, Math.max(0.5, 1 + CATCH_UP * behind));
  }
  if (Math.abs(shown.get(before) - shown.get(after)) < frameLength() / 2) drawDifference();
}

function drawDifference() {
  const context = canvas.getContext("2d");
  context.globalCompositeOperation = "copy";
  context.drawImage(before, 0, 0, canvas.width, canvas.height);
  context.globalCompositeOperation = "difference";
  context.drawImage(after, 0, 0, canvas.width, canvas.height);
}

function watchPictures(video) {
  video.requestVideoFrameCallback?.((_now, { mediaTime }) => {
    if (video.src && !$("play").disabled) pictureShown(video, mediaTime);
    watchPictures(video);
  });
}

function amplify() {
  canvas.style.filter = `brightness(${$("gain").value})`;
}

function keyed(event) {
  const within = $("player").contains(event.target);
  const steps = { ArrowLeft: -1, ArrowRight: 1, ...(within && { Home: -frames, End: frames }) };
  const own = event.key === " " ? "button, select, [type=checkbox]" : "select"; // elements that use the key themselves
  if ($("play").disabled || event.target.matches(own) || event.ctrlKey || event.altKey || event.metaKey) return;
  if (!within && event.target !== document.body) return;
  if (event.key === " ") play(!playing);
  else if (event.key in steps) step(steps[event.key]);
  else return;
  event.preventDefault();
}

for (const video of [before, after]) {
  video.addEventListener("loadeddata", loaded);
  video.addEventListener("click", () => $("play").disabled || play(!playing));
  watchPictures(video);
}
before.addEventListener("ended", () => play($("loop").checked));
$("play").addEventListener("click", () => play(!playing));
$("seek").addEventListener("input", () => goTo(Number($("seek").value)));
$("gain").addEventListener("change", amplify);
document.addEventListener("keydown", keyed);
amplify();
