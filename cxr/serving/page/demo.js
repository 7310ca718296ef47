// The page of `cxr demo`. Films are sent one by one to the machine that runs cxr, without their names.

const byId = (id) => document.getElementById(id);
const percent = (share) => `${(100 * share).toFixed(1)}%`;

let model = null; // what /model tells
let films = []; // { file, name, answer, error }
let chosen = null;
let round = 0; // raised when the model or the films change, so that older answers are dropped

function element(tag, className = "", text = "") {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

function say(text, failed = false) {
  byId("status").textContent = text;
  byId("status").classList.toggle("failed", failed);
}

async function ask(path, parameters, body) {
  const options = body ? { method: "POST", body, headers: { "Content-Type": "application/octet-stream" } } : {};
  let response;
  try {
    response = await fetch(`${path}?${new URLSearchParams(parameters)}`, options);
  } catch (error) {
    throw new Error(body ? "not read: a folder, or cxr demo has ended" : "cxr demo does not answer; start it again", {
      cause: error,
    });
  }
  const found = await response.json();
  if (!response.ok) throw new Error(found.error);
  return found;
}

function askOf(path, film) {
  const dot = film.name.lastIndexOf(".");
  return ask(path, { model: model.uri, ending: dot < 0 ? "" : film.name.slice(dot) }, film.file);
}

// Models

async function showModels() {
  const choices = await ask("choices", {});
  byId("models").replaceChildren(...choices.map((choice) => new Option(choice.name, choice.uri)));
  await useModel();
}

async function useModel() {
  const mine = ++round;
  for (const film of films) film.answer = film.error = null;
  byId("viewer").hidden = byId("verdict").hidden = true;
  showList();
  say("Loading the model …");
  const found = await ask("model", { model: byId("models").value });
  if (mine !== round) return;
  model = found;
  say("");
  byId("phantoms").hidden = !model.phantoms;
  byId("notes").replaceChildren(
    ...Object.entries(model.notes).flatMap(([name, text]) => [element("dt", "", name), element("dd", "", text)]),
  );
  await answerAll();
}

// Films

async function add(files) {
  films.push(...Array.from(files, (file) => ({ file, name: file.name, answer: null, error: null })));
  if (model) await answerAll();
}

async function answerAll() {
  const mine = ++round;
  chosen ??= films[0] ?? null;
  for (const [index, film] of films.entries()) {
    if (film.answer || film.error) continue;
    say(`Reading film ${index + 1} of ${films.length} …`);
    try {
      const found = await askOf("predict", film);
      if (mine !== round) return;
      film.answer = found;
    } catch (error) {
      if (mine !== round) return;
      film.error = error.message;
    }
    showList();
    if (film === chosen) display(film);
  }
  say("");
  if (chosen?.error) display(chosen);
}

function showList() {
  const read = films.filter((film) => film.answer).length;
  const failed = films.filter((film) => film.error).length;
  byId("results").hidden = !films.length;
  byId("drop").classList.toggle("small", films.length > 0);
  byId("count").textContent = `${read} of ${films.length} films read${failed ? `, ${failed} refused` : ""}`;
  byId("save").disabled = !films.length || read + failed < films.length;
  byId("list").replaceChildren(...films.map(listed));
}

function listed(film) {
  const item = element("li");
  const button = element("button", film.error ? "failed" : "");
  button.type = "button";
  button.setAttribute("aria-current", film === chosen);
  button.addEventListener("click", () => display(film));
  button.append(element("span", "", film.name));
  if (film.answer) {
    const row = film.answer.row;
    const doubts = [row.abstain && "abstains", isUnfamiliar(row) && "unlike the training films"].filter(Boolean);
    button.append(element("b", "", row.abstain ? "no decision" : row.label));
    const of = model.binary ? model.classes[1] : row.label;
    button.append(element("small", "", [`${of} ${percent(row.probability)}`, ...doubts].join(" · ")));
    button.classList.toggle("uncertain", doubts.length > 0);
  } else {
    button.append(element("b", "", film.error ? "refused" : "…"), element("small", "", film.error ?? ""));
  }
  item.append(button);
  return item;
}

function isUnfamiliar(row) {
  return row.familiarity !== undefined && row.familiarity < model.unfamiliar;
}

// The chosen film

async function show(film) {
  const other = film !== chosen;
  chosen = film;
  byId("viewer").hidden = byId("verdict").hidden = !film.answer;
  if (other) showList();
  if (!film.answer) {
    if (film.error) say(`${film.name}: ${film.error}`, true);
    return;
  }
  if (other) say("");
  showVerdict(film.answer);
  byId("title").textContent = film.name;
  const { uri } = model;
  byId("frame").classList.toggle("waiting", film.pictureOf !== uri); // never another film under this verdict
  if (film.pictureOf !== uri) {
    film.picture = await askOf("explain", film);
    film.pictureOf = uri;
  }
  if (film !== chosen || uri !== model.uri) return;
  byId("frame").classList.remove("waiting");
  const { film: image, heat, aspect, class: shown } = film.picture;
  byId("film").src = image;
  byId("heat").src = heat;
  byId("frame").style.aspectRatio = aspect;
  byId("frame").style.maxWidth = `calc(75vh * ${aspect})`;
  byId("heat-hint").textContent =
    `Grad-CAM: where the network found support for ${shown}. It shows neither disease nor what would change the answer.`;
}

function showVerdict({ row, probabilities }) {
  const positive = model.classes[1];
  const decision = byId("decision");
  decision.textContent = row.abstain ? "No decision" : row.label;
  const doubtful = row.abstain || isUnfamiliar(row);
  decision.className = `decision${doubtful ? " doubtful" : model.binary && row.decision === 1 ? " positive" : ""}`;
  const side = row.decision === 1 ? "at or above" : "below";
  const place = model.binary
    ? `The probability of ${positive} is ${percent(row.probability)}, ${side} the threshold of ${percent(model.threshold)}.`
    : `The most probable class, with ${percent(row.probability)}.`;
  byId("reason").textContent = row.abstain ? `The model abstains: it is too uncertain. ${place}` : place;
  byId("scale").replaceChildren(...(model.binary ? scale(row.probability, row.decision) : bars(probabilities)));
  const warning = byId("unfamiliar");
  warning.hidden = !isUnfamiliar(row);
  warning.textContent =
    "This image is unlike the films that the model was trained on. Do not rely on what it says about it.";
  const facts = row.familiarity === undefined ? [] : [["familiarity", familiarity(row)]];
  byId("facts").replaceChildren(...facts.flatMap(([name, text]) => [element("dt", "", name), element("dd", "", text)]));
}

function familiarity(row) {
  return `${row.familiarity.toFixed(0)} of 100 validation films are at most as familiar`;
}

function scale(probability, decision) {
  const track = element("div", "track");
  track.setAttribute("role", "img");
  track.setAttribute("aria-label", `${percent(probability)} on a scale to 100%, threshold ${percent(model.threshold)}`);
  const fill = element("div", `fill${decision === 1 ? " positive" : ""}`);
  fill.style.width = percent(probability);
  track.append(fill);
  if (model.undecided) {
    const zone = element("div", "zone");
    const [low, high] = model.undecided;
    zone.style.left = percent(low);
    zone.style.width = percent(high - low);
    zone.title = "abstains here";
    track.append(zone);
  }
  const tick = element("div", `tick${model.threshold < 0.2 ? " left" : model.threshold > 0.8 ? " right" : ""}`);
  tick.style.left = percent(model.threshold);
  tick.append(element("span", "", `threshold ${percent(model.threshold)}`));
  track.append(tick);
  const ends = element("div", "ends");
  ends.append(element("span", "", `0% ${model.classes[0]}`), element("span", "", `${model.classes[1]} 100%`));
  const hint = element("p", "hint", model.undecided ? "Between the dashed lines the model abstains." : "");
  return [track, ends, hint];
}

function bars(probabilities) {
  const order = probabilities.map((share, index) => [share, index]).sort((a, b) => b[0] - a[0]);
  return order.map(([share, index]) => {
    const line = element("div", "class");
    const track = element("div", "track");
    const fill = element("div", "fill");
    fill.style.width = percent(share);
    track.append(fill);
    line.append(element("span", "", model.classes[index]), track, element("output", "", percent(share)));
    return line;
  });
}

// The table, as `cxr predict --out` writes it

function csv() {
  const columns = ["image", ...model.columns, "error"];
  const rows = films.map((film) => ({ image: film.name, ...film.answer?.row, error: film.error ?? "" }));
  return [columns, ...rows.map((row) => columns.map((name) => row[name] ?? ""))]
    .map((cells) => cells.map(cell).join(","))
    .join("\n");
}

function cell(value) {
  const text = typeof value === "boolean" ? (value ? "True" : "False") : String(value);
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

function save() {
  const link = element("a");
  link.href = URL.createObjectURL(new Blob([csv(), "\n"], { type: "text/csv" }));
  link.download = "predictions.csv";
  link.click();
  URL.revokeObjectURL(link.href);
}

function clear() {
  round += 1;
  films = [];
  chosen = null;
  for (const id of ["film", "heat"]) byId(id).removeAttribute("src");
  say("");
  showList();
}

function attempt(action) {
  return (...given) => action(...given).catch((error) => say(error.message, true));
}

const display = attempt(show);

byId("models").addEventListener("change", attempt(useModel));
byId("files").addEventListener("change", (event) => {
  attempt(add)(event.target.files);
  event.target.value = ""; // so that the same file can be chosen again
});
byId("opacity").addEventListener("input", showOpacity);
byId("save").addEventListener("click", save);
byId("clear").addEventListener("click", clear);
for (const name of ["dragover", "drop", "dragleave"]) {
  document.addEventListener(name, (event) => {
    event.preventDefault(); // or the browser would open the file
    byId("drop").classList.toggle("over", name === "dragover");
    if (name === "drop") attempt(add)(event.dataTransfer.files);
  });
}

function showOpacity() {
  const value = byId("opacity").value;
  byId("heat").style.opacity = value / 100;
  byId("opacity-value").textContent = `${value}%`;
}

showOpacity();
attempt(showModels)();
