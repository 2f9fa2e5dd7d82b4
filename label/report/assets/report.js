"use strict";

// Sorts a table by the column whose head was pressed; cells carry their value in data-v where it is not their text.
function makeSortable(table) {
  const heads = [...table.tHead.rows[0].cells];
  const value = (row, i) => {
    const cell = row.cells[i];
    return cell.dataset.v === undefined ? cell.textContent.trim().toLowerCase() : cell.dataset.v;
  };
  heads.forEach((head, i) => {
    const button = head.querySelector("button");
    if (!button) return;
    button.addEventListener("click", () => {
      const numeric = head.classList.contains("n") || head.dataset.sort === "number";
      const current = head.getAttribute("aria-sort");
      const down = current === null ? numeric : current === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const body = table.tBodies[0];
      const rows = [...body.rows].map((row) => [value(row, i), row]);
      rows.sort(([a], [b]) => {
        // what is not known comes last, whichever way
        if (a === "" || b === "") return (a === "") - (b === "");
        const order = numeric ? Number(a) - Number(b) : a.localeCompare(b);
        return down ? -order : order;
      });
      body.append(...rows.map(([, row]) => row));
    });
  });
}

// Shows the rows that hold all words of the text field and match every choice.
function makeFilter(tools) {
  const table = document.getElementById(tools.dataset.for);
  const text = tools.querySelector("input");
  const choices = [...tools.querySelectorAll("select")];
  const rows = [...table.tBodies[0].rows];
  const output = tools.querySelector("output");
  const apply = () => {
    const words = text.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const content = row.textContent.toLowerCase();
      const match =
        words.every((word) => content.includes(word)) &&
        choices.every((c) => !c.value || (row.dataset[c.name] || "").split(" ").includes(c.value));
      row.hidden = !match;
      shown += match;
    }
    output.textContent = `${shown.toLocaleString("en")} of ${rows.length.toLocaleString("en")} shown`;
  };
  tools.hidden = false;
  text.addEventListener("input", apply);
  choices.forEach((choice) => choice.addEventListener("change", apply));
  apply();
}

document.querySelectorAll("table.sortable").forEach(makeSortable);
document.querySelectorAll(".tools").forEach(makeFilter);
document.addEventListener("keydown", (event) => {
  const typing = event.target instanceof Element && event.target.closest("input, select, textarea");
  if (typing || event.altKey || event.ctrlKey || event.metaKey) return;
  const rel = { ArrowLeft: "prev", ArrowRight: "next" }[event.key];
  const link = rel && document.querySelector(`nav a[rel="${rel}"]`);
  if (link && !(event.target instanceof Element && event.target.closest(".scroll"))) link.click();
});
