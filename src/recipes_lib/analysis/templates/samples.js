// The sample browser. Texts of models reach the page through textContent alone, so they stay text.
"use strict";
(function () {
  const $ = (id) => document.getElementById(id);
  const form = $("filters");
  let data = null, shown = [], place = 0;

  function make(tag, text, name) {
    const node = document.createElement(tag);
    if (text !== undefined) node.textContent = text;
    if (name) node.className = name;
    return node;
  }

  function fill(select, first, values) {
    const before = select.value;
    select.replaceChildren();
    const all = make("option", first);
    all.value = "";
    select.append(all);
    for (const [value, text] of values) {
      const option = make("option", text);
      option.value = value;
      select.append(option);
    }
    select.value = values.some(([value]) => String(value) === before) ? before : "";
  }

  // Values of a column with their counts, the most frequent first.
  function counted(samples, column) {
    const counts = new Map();
    for (const sample of samples) counts.set(sample[column], (counts.get(sample[column]) || 0) + 1);
    return [...counts].sort((a, b) => b[1] - a[1] || String(a[0]).localeCompare(String(b[0]))).map(([value, n]) => [value, value + " (" + n + ")"]);
  }

  function offer() {
    const group = form.group.value;
    const mine = data.samples.filter((sample) => group === "" || String(sample[0]) === group);
    fill(form.outcome, "any", counted(mine, 3));
    fill(form.category, "any", counted(mine, 2));
  }

  function select() {
    const group = form.group.value, outcome = form.outcome.value, category = form.category.value;
    const flip = form.flip.checked, text = form.text.value.toLowerCase();
    const has = text && data.texts.map((one) => one.toLowerCase().includes(text));
    shown = data.samples.filter((sample) =>
      (group === "" || String(sample[0]) === group) && (outcome === "" || sample[3] === outcome) &&
      (category === "" || sample[2] === category) && (!flip || sample[4]) &&
      (!text || sample[1].toLowerCase().includes(text) || [sample[5], sample[6], sample[7], ...sample[8].map((one) => one[2])].some((one) => one !== null && has[one])));
    place = 0;
    show();
  }

  function block(parent, title, text, name) {
    const part = make("div");
    part.append(make("h4", title), make("div", text === "" ? "(empty)" : text, "text " + (name || "")));
    parent.append(part);
  }

  function show() {
    const card = $("sample");
    card.replaceChildren();
    $("previous").disabled = place <= 0;
    $("next").disabled = place >= shown.length - 1;
    $("place").textContent = shown.length ? (place + 1).toLocaleString("en") + " of " + shown.length.toLocaleString("en") : "no matches";
    card.hidden = !shown.length;
    if (!shown.length) return;
    const [group, question, category, outcome, flip, asked, answer, opponent, verdicts] = data.samples[data.samples.indexOf(shown[place])];
    const facts = data.groups[group];
    const head = make("p");
    head.append(make("b", outcome), make("span", "  " + (flip ? "· verdict flips with the order " : "") + "· " + category + " · " + question + " · " + facts.title, "aside"));
    card.append(head);
    block(card, "question", data.texts[asked]);
    const sides = make("div", undefined, "sides");
    block(sides, "answer of " + facts.arm, data.texts[answer]);
    if (opponent !== null) block(sides, "answer of " + facts.opponent, data.texts[opponent]);
    card.append(sides);
    const raws = make("div", undefined, "sides");
    for (const [order, said, raw] of verdicts) {
      const names = { AB: facts.arm + " shown first", BA: facts.opponent + " shown first", grade: "grade" };
      const winner = { "AB,A": facts.arm, "AB,B": facts.opponent, "BA,A": facts.opponent, "BA,B": facts.arm }[order + "," + said];
      block(raws, "verdict, " + (names[order] || order) + ": " + said + (winner ? " (" + winner + ")" : ""), raw === null ? "(nothing stored)" : data.texts[raw], "raw");
    }
    card.append(raws);
    card.append(make("p", "files: " + facts.folder, "aside"));
  }

  function start() {
    data = JSON.parse($("sample-data").textContent);
    fill(form.group, "all", data.groups.map((group, number) => [number, group.title]));
    if (data.groups.length) form.group.value = "0";
    offer();
    form.group.addEventListener("change", () => { offer(); select(); });
    for (const name of ["outcome", "category", "flip"]) form[name].addEventListener("change", select);
    form.text.addEventListener("input", select);
    form.addEventListener("submit", (event) => event.preventDefault());
    for (const link of document.querySelectorAll("a[data-rows]"))
      link.addEventListener("click", () => { form.group.value = link.dataset.rows; offer(); select(); });
    $("previous").addEventListener("click", () => { if (place > 0) { place--; show(); } });
    $("next").addEventListener("click", () => { if (place < shown.length - 1) { place++; show(); } });
    select();
  }

  if (form) setTimeout(start, 0);
})();
