// The page of the service: it sends a video to v1/purify and shows each line of the answer as it comes. What it knows
// of the server is in v1/info. Addresses are relative, so that the service may live below any path.

import { SMALL, load, unload } from "./player.js";

const STAGES = ["upload", "queue", "encode", "evaluate", "decode"];
const TIMES = { queue: "Queue", encode: "Encode", sample: "Sample", decode: "Decode", other: "Other" };
const ROWS = 5; // labels in the list of votes
const SERIES = 6; // colors in style.css
const MOST_HEAD = 1000; // bytes before a live picture
const SENTENCES = { // for answers that are not the service's own, but of a proxy in between
  413: "The video is larger than this server accepts",
  502: "The service behind this address does not answer",
  503: "The service is busy",
  504: "The result was not there in time",
};
const NO_TOKEN = "This server asks for its token. Whoever started it knows that.";
const WRONG_TOKEN = "This is not the server's token.";
const GONE = "The server was not reached, or it closed the connection. Is it still running?";
const BROKEN_OFF = "The answer broke off before the result was there.";
const NOT_PLAYED = "This browser cannot play the result. It can be downloaded all the same.";

const $ = (id) => document.getElementById(id);
const seconds = (value) => value.toFixed(value < 10 ? 2 : 1);

let info = null; // of the server
let file = null; // the video that was chosen last
let request = null; // the one in flight
let state = nothing(); // of the answer

/** What is known of an answer: its numbers of windows, frames and votes at most; steps that are done, by stage and
 * window; the labels in the order of their votes, and how many each has. */
function nothing() {
  return { windows: 1, frames: 0, decodes: 0, progress: new Map(), votes: [], counts: new Map() };
}

function create(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function part(series, share) {
  const element = create("i", { className: series < 0 ? "" : `series-${(series % SERIES) + 1}` });
  element.style.flexGrow = share;
  return element;
}

function badge(id, text, tone = "") {
  $(id).textContent = text;
  $(id).className = `badge ${tone}`;
}

function say(text) {
  $("error").hidden = true;
  $("status").hidden = false;
  $("status").textContent = text;
}

function fail(text) {
  $("status").hidden = true;
  $("error").hidden = false;
  $("error").textContent = text;
}

// The server

function authorization() {
  const token = sessionStorage.getItem("token");
  return token ? { Authorization: `Bearer ${token}` } : {};
}

async function connect() {
  try {
    const answer = await fetch("v1/info", { headers: authorization() });
    if (!answer.ok) {
      badge("server", answer.status === 401 ? "token needed" : "not ready", "warn");
      refused(answer.status, await answer.text(), answer.headers.get("Retry-After"));
      return;
    }
    info = await answer.json();
  } catch {
    badge("server", "not reached", "bad");
    fail(GONE);
    return;
  }
  $("login").hidden = true;
  badge("server", `${info.model}, ${info.frames} frames of ${info.size} px a window`, "good");
  $("limits").textContent = limitsSentence(info.limits);
  $("steps").placeholder = info.steps;
  $("sources").replaceChildren(...(info.live ?? []).map(liveSource));
  $("live").hidden = !info.live?.length;
}

function bytes(count) {
  const [unit, name] = count < 2 ** 20 ? [2 ** 10, "KiB"] : [2 ** 20, "MiB"];
  return `${+(count / unit).toPrecision(3)} ${name}`;
}

function limitsSentence({ bytes: most, seconds: length, frames, pixels }) {
  const number = (value) => value.toLocaleString("en");
  const megapixels = (pixels / 1e6).toPrecision(2);
  return `Up to ${bytes(most)}, ${number(length)} s, ${number(frames)} frames of ${megapixels} megapixels`;
}

/** Why a request was refused: the server's own words if it has some, as sentences. */
function reason(status, body, retryAfter) {
  if (status === 401) return sessionStorage.getItem("token") ? WRONG_TOKEN : NO_TOKEN;
  let words;
  try {
    words = JSON.parse(body).detail;
  } catch {
    words = null;
  }
  if (typeof words !== "string" || !words) words = SENTENCES[status] ?? `The server answered with status ${status}`;
  const room = retryAfter ? ` It expects room in ${retryAfter} s.` : "";
  return `${words[0].toUpperCase()}${words.slice(1).replace(/\.$/, "")}.${room}`;
}

function refused(status, body, retryAfter) {
  fail(reason(status, body, retryAfter));
  if (status === 401) {
    $("login").hidden = false;
    $("token").focus();
  }
}

function useToken(event) {
  event.preventDefault();
  sessionStorage.setItem("token", $("token").value);
  $("token").value = "";
  say("Token taken.");
  connect();
  if (file) send();
}

// Live sources

function liveSource(name) {
  const canvas = create("canvas", { role: "img", ariaLabel: `${name}, purified`, hidden: true });
  const button = create("button", { textContent: "Watch" });
  let watching = null;
  button.addEventListener("click", async () => {
    if (watching) return watching.abort();
    watching = new AbortController();
    button.textContent = "Stop";
    const problem = await watchLive(name, canvas, watching.signal);
    if (problem) fail(problem);
    canvas.hidden = true;
    button.textContent = "Watch";
    watching = watching.abort(); // where a picture could not be drawn more would come
  });
  const caption = create("figcaption", { className: "head" }, name, button);
  return create("figure", {}, create("div", { className: "frame" }, canvas), caption);
}

/** Draws the pictures of a source until they end or the signal comes; returns what went wrong. An <img> of this address
 * could send no token, and would not say why there is no picture. */
async function watchLive(name, canvas, signal) {
  try {
    const answer = await fetch(`v1/live/${encodeURIComponent(name)}`, { headers: authorization(), signal });
    if (!answer.ok) return reason(answer.status, await answer.text(), answer.headers.get("Retry-After"));
    const reader = answer.body.getReader();
    let data = new Uint8Array();
    for (let piece = await reader.read(); !piece.done; piece = await reader.read()) {
      data = new Uint8Array(await new Blob([data, piece.value]).arrayBuffer());
      for (let part = firstPart(data); part; part = firstPart(data)) {
        await drawPicture(canvas, data.subarray(part.start, part.end));
        data = data.subarray(part.end);
      }
    }
    return `The live source ${name} has ended.`;
  } catch {
    return signal.aborted ? null : `The live source ${name} broke off.`;
  }
}

/** Where the first picture of multipart data lies; null if it is not whole yet. */
function firstPart(data) {
  const head = /Content-Length: (\d+)\r\n\r\n/i.exec(new TextDecoder("latin1").decode(data.subarray(0, MOST_HEAD)));
  if (!head) return null;
  const start = head.index + head[0].length;
  const end = start + Number(head[1]);
  return end <= data.length ? { start, end } : null;
}

async function drawPicture(canvas, data) {
  const picture = await createImageBitmap(new Blob([data], { type: "image/jpeg" }));
  Object.assign(canvas, { width: picture.width, height: picture.height, hidden: false });
  canvas.parentElement.classList.toggle("pixels", picture.width < SMALL);
  canvas.getContext("2d").drawImage(picture, 0, 0);
  picture.close();
}

// Sending a video and reading the answer

function choose(files) {
  if (!files.length) return;
  file = files[0];
  $("chosen").textContent = `${file.name}, ${bytes(file.size)}`;
  send();
}

function send() {
  if (!$("steps").reportValidity()) return;
  request?.abort();
  start();
  if (info && file.size > info.limits.bytes) {
    finish();
    fail(`The video has ${bytes(file.size)}; this server accepts ${bytes(info.limits.bytes)} at most.`);
    return;
  }
  const form = new FormData();
  form.append("video", file, file.name);
  if ($("steps").value) form.append("steps", $("steps").value);

  const mine = new XMLHttpRequest(); // fetch tells nothing of how far an upload is
  let read = 0;
  const readLines = () => {
    for (let end; request === mine && (end = mine.responseText.indexOf("\n", read)) >= 0; ) {
      const line = mine.responseText.slice(read, end);
      read = end + 1;
      if (line) take(JSON.parse(line));
    }
  };
  const ends = (handle) => () => {
    if (request !== mine) return;
    handle();
    if (request === mine) finish();
  };
  mine.open("POST", "v1/purify");
  mine.setRequestHeader("Accept", "application/x-ndjson");
  for (const [name, value] of Object.entries(authorization())) mine.setRequestHeader(name, value);
  mine.upload.addEventListener("progress", ({ loaded, total }) => {
    if (request === mine && total) stage("upload", loaded / total, `${Math.floor((100 * loaded) / total)} %`);
  });
  mine.addEventListener("progress", () => mine.status === 200 && readLines());
  mine.addEventListener("load", ends(() => {
    if (mine.status !== 200) return refused(mine.status, mine.responseText, mine.getResponseHeader("Retry-After"));
    readLines();
    if (request === mine) fail(BROKEN_OFF);
  }));
  mine.addEventListener("error", ends(() => fail(mine.status === 200 ? BROKEN_OFF : GONE)));
  mine.addEventListener("abort", ends(() => say("Canceled.")));
  request = mine;
  mine.send(form);
}

function start() {
  state = nothing();
  for (const name of STAGES) stage(name, 0, "");
  unload();
  drawVotes();
  drawTimes(null);
  busy(true);
  say(`Sending ${file.name}`);
}

function finish() {
  request = null;
  busy(false);
}

function busy(on) {
  const [from, to] = on ? ["again", "cancel"] : ["cancel", "again"];
  const held = document.activeElement === $(from);
  $(to).disabled = false;
  if (held) $(to).focus(); // a button that is disabled drops the focus
  $(from).disabled = true;
}

function stage(name, share, text) {
  $(name).value = share;
  $(`${name}-count`).textContent = text;
}

function take(event) {
  const handle = { queued, started, progress, vote, done, error }[event.event];
  handle?.(event);
}

function queued({ ahead }) {
  stage("upload", 1, "100 %");
  stage("queue", 0, `${ahead} ahead`);
  say(ahead === 1 ? "One video is ahead of yours." : `${ahead} videos are ahead of yours.`);
}

function started({ windows, frames, height, width }) {
  Object.assign(state, { windows, frames });
  stage("upload", 1, "100 %");
  stage("queue", 1, "0 ahead");
  const parts = windows === 1 ? "one window" : `${windows} windows`;
  say(`Purifying ${frames} frames of ${width} × ${height} pixels in ${parts}.`);
}

function progress({ window, stage: name, done, total }) {
  const windows = state.progress.get(name) ?? new Map();
  state.progress.set(name, windows.set(window, done));
  const sum = [...windows.values()].reduce((a, b) => a + b, 0);
  const all = total * state.windows; // of decodes, those that there are at most
  stage(name, sum / all || 0, `${sum} of ${all}`);
  if (name === "decode") state.decodes = all;
}

function vote(event) {
  const label = String(event.label); // a number where the classifier has no names
  state.votes.push(label);
  state.counts.set(label, (state.counts.get(label) ?? 0) + 1);
  drawVotes();
}

function done(answer) {
  for (const name of STAGES) $(name).value = 1;
  if (answer.votes) {
    const counts = new Map(Object.entries(answer.votes));
    const known = [...state.counts.keys()].filter((label) => counts.has(label)); // in the order of their colors
    state.counts = new Map([...known, ...counts.keys()].map((label) => [label, counts.get(label)]));
    drawVotes(String(answer.label));
  } else {
    badge("verdict", "no classifier");
  }
  drawTimes(answer.times);
  load(answer.before, answer.after, state.frames, `${file.name.replace(/\.[^.]*$/, "")}-purified.mp4`);
  finish();
  const label = answer.label === null ? "" : ` The label is ${answer.label}.`;
  say(`Purified in ${seconds(answer.times.total)} s.${label}`);
}

function error({ status, detail }) {
  finish();
  refused(status, JSON.stringify({ detail }), null);
}

// Votes and times

function drawVotes(decided = null) {
  const labels = [...state.counts.keys()];
  const ranked = [...state.counts].sort((a, b) => b[1] - a[1]);
  const seen = ranked.reduce((sum, [, count]) => sum + count, 0);
  const all = Math.max(seen, state.decodes);
  const lead = seen ? ranked[0][1] - (ranked[1]?.[1] ?? 0) : 0;
  const leader = decided ?? (lead ? ranked[0][0] : null);
  const settled = decided !== null || (state.decodes > 0 && lead > all - seen);

  const series = (label) => labels.indexOf(label);
  $("track").replaceChildren(...state.votes.map((label) => part(series(label), 1 / all)));
  $("track").setAttribute("aria-label", seen ? `${seen} votes of ${all} at most` : "No votes yet");
  const rest = ranked.splice(ranked.length > ROWS ? ROWS - 1 : ROWS);
  if (rest.length) ranked.push([`${rest.length} other labels`, rest.reduce((sum, [, count]) => sum + count, 0)]);
  const row = ([label, count]) => voteRow(label, count, part(series(label), count / seen), label === leader);
  $("votes").replaceChildren(...ranked.map(row));
  if (!seen) badge("verdict", "no votes yet");
  else if (leader === null) badge("verdict", "undecided");
  else if (!lead) badge("verdict", `${leader}, of equals`, "warn");
  else badge("verdict", settled ? `${leader}, settled` : `${leader} leads`, settled ? "good" : "");
}

function voteRow(label, count, mark, leads) {
  const name = create("span", { textContent: label });
  const number = create("span", { className: "number", textContent: count });
  const row = create("li", {}, name, create("div", { className: "bar" }, mark), number);
  if (leads) row.setAttribute("aria-current", "true");
  return row;
}

function drawTimes(times) {
  const spent = times && { ...times };
  if (spent) spent.other = Math.max(0, times.total - times.queue - times.encode - times.sample - times.decode);
  const share = (name) => (spent.total ? spent[name] / spent.total : 0);
  $("parts").replaceChildren(...(spent ? Object.keys(TIMES).map((name, i) => part(i, share(name))) : []));
  $("times").replaceChildren(...Object.entries(TIMES).map(([name, title], i) => {
    const cell = (text) => create("td", { className: "number", textContent: spent ? text() : "–" });
    const swatch = create("i", { className: `swatch series-${i + 1}` });
    const cells = [cell(() => seconds(spent[name])), cell(() => `${Math.round(100 * share(name))} %`)];
    return create("tr", {}, create("td", {}, swatch, title), ...cells);
  }));
  badge("total", spent ? `${seconds(spent.total)} s` : "not yet");
}

$("file").addEventListener("change", () => {
  choose($("file").files);
  $("file").value = ""; // the same file can be chosen again
});
$("again").addEventListener("click", send);
$("cancel").addEventListener("click", () => request?.abort());
$("login").addEventListener("submit", useToken);
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  $("drop").classList.add("over");
});
document.addEventListener("dragleave", (event) => event.relatedTarget || $("drop").classList.remove("over"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  $("drop").classList.remove("over");
  choose(event.dataTransfer.files);
});

for (const video of ["before", "after"]) $(video).addEventListener("error", () => fail(NOT_PLAYED));
drawTimes(null);
connect();
