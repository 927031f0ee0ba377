// Tables sort by a click, Enter or the space bar on a column's head; without this the page reads the same, unsorted.
const units = {ns: 1e-9, "µs": 1e-6, ms: 1e-3, KiB: 2 ** 10, MiB: 2 ** 20, GiB: 2 ** 30, TiB: 2 ** 40};
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  if (body.rows.length < 3) continue;
  const value = (row, i) => {
    const text = (row.cells[i]?.textContent ?? "").trim();
    const number = parseFloat(text.replace(/,/g, "").replace(/^[^0-9+-]+/, ""));
    const unit = units[/^\S+ (\S+)/.exec(text)?.[1]] ?? 1;
    return !heads[i].classList.contains("n") ? text : number * unit;
  };
  // Rows without a number stay below the others, whichever way these are sorted.
  const compare = (a, b, up) => a !== a || b !== b ? (a !== a) - (b !== b) : (up ? 1 : -1) * (a < b ? -1 : a > b ? 1 : 0);
  heads.forEach((head, i) => {
    if (!head.textContent) return;
    head.classList.add("sorts");
    head.tabIndex = 0;
    const sort = () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      body.append(...[...body.rows].sort((a, b) => compare(value(a, i), value(b, i), up)));
    };
    head.addEventListener("click", sort);
    head.addEventListener("keydown", event => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      sort();
    });
  });
}
// Paper shows what the screen folds away.
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach(part => { part.open = true; }));
