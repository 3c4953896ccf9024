"use strict";
// Without this script the table is a plain table, by depth and loss.
for (const table of document.querySelectorAll(".sortable")) {
  const body = table.tBodies[0];
  const value = (row, column) => {
    const raw = row.cells[column].dataset.sort;
    return raw === undefined ? null : raw !== "" && !Number.isNaN(Number(raw)) ? Number(raw) : raw;
  };
  const compare = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b)));
  [...table.tHead.rows[0].cells].forEach((header, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...header.childNodes);
    header.append(button);
    button.addEventListener("click", () => {
      const down = header.getAttribute("aria-sort") === "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      header.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...body.rows].sort((one, two) => {
        const a = value(one, column), b = value(two, column);
        if (a === null || b === null) return (a === null) - (b === null); // missing numbers stay last
        return down ? compare(b, a) : compare(a, b);
      });
      body.append(...rows);
    });
  });
  for (const hint of document.querySelectorAll(".scripted")) hint.hidden = false;
}
