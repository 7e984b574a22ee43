"use strict";

const element = (id) => document.getElementById(id);
const MODEL = { max_characters: Infinity, may_refuse: false, task: "question_answering" };

/** The server counts characters; JavaScript's strings count halves of some of them. */
const characters = (text) => Array.from(text);

async function request(path, options) {
  const response = await fetch(path, options);
  const content = await response.json();
  if (!response.ok) throw new Error(content.error);
  return content;
}

function say(text, wrong = false) {
  element("message").textContent = text;
  element("message").classList.toggle("wrong", wrong);
}

function showSize() {
  const size = characters(element("context").value).length + characters(element("question").value).length;
  const over = size > MODEL.max_characters;
  const format = (count) => count.toLocaleString("en");
  element("size").textContent = over
    ? `${format(size)} characters: ${format(size - MODEL.max_characters)} too many`
    : `${format(size)} characters`;
  element("ask").disabled = over;
}

function showText(context, answers, chosen) {
  const text = element("text");
  text.replaceChildren();
  // Cut the text wherever an answer begins or ends; each piece is marked by the answers that cover it.
  const marked = answers.filter((answer) => answer.end > answer.start);
  const by = (edge) => {
    const found = new Map();
    for (const answer of marked) found.set(answer[edge], [...(found.get(answer[edge]) ?? []), answer]);
    return found;
  };
  const begins = by("start"), ends = by("end"), open = new Set();
  const cuts = [...new Set([0, ...begins.keys(), ...ends.keys(), context.length])].sort((a, b) => a - b);
  for (let i = 0; i + 1 < cuts.length; i++) {
    for (const answer of ends.get(cuts[i]) ?? []) open.delete(answer);
    for (const answer of begins.get(cuts[i]) ?? []) open.add(answer);
    const piece = context.slice(cuts[i], cuts[i + 1]).join("");
    if (!open.size) {
      text.append(piece);
      continue;
    }
    const mark = document.createElement("mark");
    mark.textContent = piece;
    mark.classList.toggle("chosen", open.has(answers[chosen]));
    const types = [...open].filter((answer) => answer.type && answer.end === cuts[i + 1]).map(({ type }) => type);
    if (types.length) mark.dataset.type = types.join(" ");
    text.append(mark);
  }
}

function showAnswers(context, answers, chosen) {
  const items = answers.map((answer, i) => {
    const button = document.createElement("button");
    const score = document.createElement("span");
    const text = document.createElement("span");
    button.type = "button";
    button.setAttribute("aria-pressed", String(i === chosen));
    score.className = "score";
    score.textContent = `${(100 * answer.score).toFixed(1)} %`;
    const name = document.createElement("span");
    name.className = answer.answer ? "name" : "none";
    name.textContent = answer.answer || "no answer in the text";
    text.append(name);
    if (answer.type) {
      const type = document.createElement("span");
      type.className = "type";
      type.textContent = ` ${answer.type}`;
      text.append(type);
    }
    button.append(score, text);
    button.addEventListener("click", () => {
      showAnswers(context, answers, i);
      element("answers").children[i].firstChild.focus();
      document.querySelector("mark.chosen")?.scrollIntoView({ block: "nearest" });
    });
    const item = document.createElement("li");
    item.append(button);
    return item;
  });
  element("answers").replaceChildren(...items);
  showText(context, answers, chosen);
}

/** What is posted, and the reply as answers with their places. */
const KINDS = {
  question_answering: {
    body: (context) => ({ question: element("question").value, context, top_k: Number(element("top_k").value) }),
    answers: (reply) => reply.answers,
    details: (answers) => {
      const { windows, no_answer_probability } = answers[0];
      const none = (100 * no_answer_probability).toFixed(1);
      return `, read in ${windows.length === 1 ? "one window" : `${windows.length} windows`}` +
        (MODEL.may_refuse ? `; no answer in the text: ${none} %` : "");
    },
  },
  token_classification: {
    body: (text) => ({ text }),
    answers: (reply) => reply.entities.map((entity) => ({ ...entity, answer: entity.word, type: entity.entity_group })),
    details: (entities) => (entities.length ? "" : ": there are no entities in the text"),
  },
};

async function ask(event) {
  event.preventDefault();
  const context = element("context").value;
  const kind = KINDS[MODEL.task];
  element("ask").disabled = true;
  say("Reading …");
  try {
    const options = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(kind.body(context)) };
    const reply = await request("answer", options);
    const answers = kind.answers(reply);
    say("");
    showAnswers(characters(context), answers, 0);
    element("details").textContent = `${reply.seconds.toFixed(2)} s${kind.details(answers)}`;
    element("result").hidden = false;
  } catch (error) {
    element("result").hidden = true;
    say(error instanceof TypeError ? "The server cannot be reached." : error.message, true);
  } finally {
    showSize();
  }
}

element("form").addEventListener("submit", ask);
element("context").addEventListener("input", showSize);
element("question").addEventListener("input", showSize);
request("model").then((model) => {
  Object.assign(MODEL, model);
  element("model").textContent = MODEL.name;
  if (MODEL.task === "token_classification") {
    for (const asked of document.querySelectorAll(".asked")) asked.hidden = true;
    element("question").required = false;
    element("title").textContent = "Find entities";
    element("found").textContent = "Entities";
    element("ask").textContent = "Read";
  }
  showSize();
}, (error) => say(error.message, true));
