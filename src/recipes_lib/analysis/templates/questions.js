// The browser of questions. Texts of models reach the page through textContent alone, so they stay text.
"use strict";
(function () {
  const $ = (id) => document.getElementById(id);
  const form = $("filters");
  let data = null, questions = [], matches = [], place = 0;

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

  // Values with their counts, the most frequent first.
  function counted(values) {
    const counts = new Map();
    for (const value of values) counts.set(value, (counts.get(value) || 0) + 1);
    return [...counts].sort((a, b) => b[1] - a[1] || String(a[0]).localeCompare(String(b[0]))).map(([value, n]) => [value, value + " (" + n + ")"]);
  }

  function readQuestion([evaluation, name, category, text, rows]) {
    const answers = rows.map(([group, outcome, score, turned, answer, opponent, verdicts]) => ({ group: data.groups[group], number: group, outcome, score, turned, answer, opponent, verdicts }));
    return { evaluation, name, category, text, answers };
  }

  // The mean over the trainings of an arm; null where none has a verdict.
  function scoreOf(question, arm) {
    const scores = question.answers.filter((one) => one.group.arm === arm && one.score !== null).map((one) => one.score);
    return scores.length ? scores.reduce((sum, score) => sum + score, 0) / scores.length : null;
  }

  function isBetter(question, better, worse) {
    const high = scoreOf(question, better), low = scoreOf(question, worse);
    return high !== null && low !== null && high > low;
  }

  // The answers that the filters for an arm and an outcome are about.
  function answersOf(question) {
    return question.answers.filter((one) => form.arm.value === "" || one.group.arm === form.arm.value);
  }

  function offer() {
    const mine = questions.filter((one) => form.group.value === "" || String(one.evaluation) === form.group.value);
    const arms = [...new Set(mine.flatMap((one) => one.answers.map((answer) => answer.group.arm)))];
    for (const select of [form.arm, form.better, form.worse]) fill(select, "any", arms.map((arm) => [arm, arm]));
    fill(form.outcome, "any", counted(mine.flatMap((one) => answersOf(one).map((answer) => answer.outcome))));
    fill(form.category, "any", counted(mine.map((one) => one.category)));
  }

  function select() {
    const evaluation = form.group.value, outcome = form.outcome.value, category = form.category.value;
    const better = form.better.value, worse = form.worse.value, text = form.text.value.toLowerCase();
    const has = text && data.texts.map((one) => one.toLowerCase().includes(text));
    const isFound = (place) => place !== null && has[place];
    matches = questions.filter((one) =>
      (evaluation === "" || String(one.evaluation) === evaluation) && (category === "" || one.category === category) &&
      answersOf(one).some((answer) => (outcome === "" || answer.outcome === outcome) && (!form.flip.checked || answer.turned)) &&
      (better === "" || worse === "" || isBetter(one, better, worse)) &&
      (!text || one.name.toLowerCase().includes(text) || isFound(one.text) ||
        one.answers.some((answer) => [answer.answer, answer.opponent, ...answer.verdicts.map((verdict) => verdict[2])].some(isFound))));
    place = 0;
    show();
  }

  function block(parent, title, text, name) {
    const part = make("div");
    part.append(make("h4", title), make("div", text === "" ? "(empty)" : text, "text " + (name || "")));
    parent.append(part);
    return part;
  }

  function textAt(place) {
    return place === null ? "(nothing stored)" : data.texts[place];
  }

  function showVerdicts(card, answer) {
    const { arm, opponent } = answer.group;
    for (const [order, said, raw] of answer.verdicts) {
      const names = { AB: arm + " shown first", BA: opponent + " shown first", grade: "grade" };
      const winner = { "AB,A": arm, "AB,B": opponent, "BA,A": opponent, "BA,B": arm }[order + "," + said];
      const details = make("details");
      details.append(make("summary", "verdict, " + (names[order] || order) + ": " + said + (winner ? " (" + winner + ")" : "")), make("div", textAt(raw), "text raw"));
      card.append(details);
    }
  }

  function show() {
    const card = $("question");
    card.replaceChildren();
    $("previous").disabled = place <= 0;
    $("next").disabled = place >= matches.length - 1;
    $("place").textContent = matches.length ? (place + 1).toLocaleString("en") + " of " + matches.length.toLocaleString("en") : "no matches";
    card.hidden = !matches.length;
    if (!matches.length) return;
    const question = matches[place];
    card.append(make("p", [data.evals[question.evaluation], question.category, question.name].join(" · "), "aside"));
    block(card, "question", data.texts[question.text]);
    const sides = make("div", undefined, "sides");
    const arms = new Set(question.answers.map((one) => one.group.arm));
    const opponents = new Map(); // an opponent that answers here as an arm has a column of its own
    for (const answer of question.answers) {
      const { arm, run, opponent, folder } = answer.group;
      const against = opponent ? " against " + opponent : "";
      const part = block(sides, arm + (run ? " (" + run + ")" : "") + against + ": " + answer.outcome + (answer.turned ? ", turned with the order" : ""), textAt(answer.answer));
      showVerdicts(part, answer);
      part.append(make("p", folder, "aside"));
      if (answer.opponent !== null && !arms.has(opponent)) opponents.set(opponent, answer.opponent);
    }
    for (const [opponent, text] of opponents) block(sides, opponent, data.texts[text]);
    card.append(sides);
  }

  function step(by) {
    if (place + by < 0 || place + by >= matches.length) return;
    place += by;
    show();
  }

  function start() {
    data = JSON.parse($("question-data").textContent);
    questions = data.questions.map(readQuestion);
    fill(form.group, "all", data.evals.map((title, number) => [number, title]));
    if (data.evals.length) form.group.value = "0";
    offer();
    for (const name of ["group", "arm"]) form[name].addEventListener("change", () => { offer(); select(); });
    for (const name of ["outcome", "better", "worse", "category", "flip"]) form[name].addEventListener("change", select);
    form.text.addEventListener("input", select);
    form.addEventListener("submit", (event) => event.preventDefault());
    for (const link of document.querySelectorAll("a[data-rows]"))
      link.addEventListener("click", () => {
        const group = data.groups[link.dataset.rows];
        form.reset();
        form.group.value = String(group.eval);
        offer();
        form.arm.value = group.arm;
        offer();
        select();
      });
    $("previous").addEventListener("click", () => step(-1));
    $("next").addEventListener("click", () => step(1));
    document.addEventListener("keydown", (event) => {
      if (/^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName) || event.altKey || event.ctrlKey || event.metaKey) return;
      if (event.key === "ArrowLeft") step(-1);
      if (event.key === "ArrowRight") step(1);
    });
    select();
  }

  if (form) setTimeout(start, 0);
})();
