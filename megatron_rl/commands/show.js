"use strict";
// Everything a model or a data set wrote reaches the page through textContent, never as markup.
const PAGE = 25;
const OUTCOMES = { "all correct": 1, mixed: 1, "all wrong": 1 };
const { run, groups } = JSON.parse(document.getElementById("data").textContent);
const filters = document.getElementById("filters");
const list = document.getElementById("groups");
const more = document.getElementById("more");
let found = [];
let shown = 0;

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function outcome(group) {
  const correct = group.responses.filter((response) => response.verdict === "correct").length;
  if (correct === 0) return "all wrong";
  return correct === group.responses.length ? "all correct" : "mixed";
}

function verdictOf(response) {
  return response.verdict === null ? "ungraded" : response.verdict;
}

function fill(name, values) {
  for (const value of ["all", ...values]) {
    const option = element("option", "", String(value));
    option.value = String(value);
    filters.elements[name].append(option);
  }
}

function matches(group) {
  const chosen = (name) => filters.elements[name].value;
  const passes = (name, value) => chosen(name) === "all" || chosen(name) === String(value);
  const needle = chosen("search").toLowerCase();
  const texts = [group.prompt, group.answer, ...group.responses.map((response) => response.text)];
  return (
    passes("iteration", group.iteration) &&
    passes("outcome", outcome(group)) &&
    group.responses.some((response) => passes("verdict", verdictOf(response))) &&
    (needle === "" || texts.some((text) => text.toLowerCase().includes(needle)))
  );
}

function responseBlock(response) {
  const block = element("details");
  const head = element("summary");
  head.append(element("span", `verdict ${verdictOf(response)}`, verdictOf(response)));
  head.append(element("span", "name", "answer"));
  head.append(element("span", "answer", response.extracted === null ? "none" : response.extracted));
  const reward = response.reward === null ? "no reward" : `reward ${response.reward}`;
  const cut = response.truncated ? ", cut at the limit" : "";
  head.append(element("span", "facts", `${reward}, ${response.tokens} tokens${cut}`));
  block.append(head, element("div", "text", response.text));
  return block;
}

function groupBlock(group) {
  const block = element("article");
  const place = `iteration ${group.iteration}, ${group.source} ${group.group}, ${outcome(group)}`;
  const gold = element("div", "gold");
  gold.append(element("span", "name", "right answer"), element("span", "answer", group.answer));
  block.append(element("h2", "", place), element("div", "text prompt", group.prompt), gold);
  const wanted = filters.elements.verdict.value;
  for (const response of group.responses) {
    const made = responseBlock(response);
    made.open = wanted !== "all" && verdictOf(response) === wanted;
    block.append(made);
  }
  return block;
}

function showMore() {
  list.append(...found.slice(shown, shown + PAGE).map(groupBlock));
  shown = Math.min(found.length, shown + PAGE);
  more.hidden = shown === found.length;
}

function refresh() {
  found = groups.filter(matches);
  shown = 0;
  list.replaceChildren();
  document.getElementById("count").textContent = `${found.length} of ${groups.length} prompts`;
  showMore();
}

document.getElementById("title").textContent = run;
document.title = `Rollouts: ${run}`;
fill("iteration", [...new Set(groups.map((group) => group.iteration))]);
fill("verdict", [...new Set(groups.flatMap((group) => group.responses.map(verdictOf)))].sort());
fill("outcome", Object.keys(OUTCOMES));
filters.addEventListener("input", refresh);
filters.addEventListener("submit", (event) => event.preventDefault());
more.addEventListener("click", showMore);
refresh();
