// Tables sort by the column whose heading is pressed: by the number that a cell says it stands for, else by its text.
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const heading = button.closest("th"), row = heading.parentNode, body = heading.closest("table").tBodies[0];
    const column = [...row.children].indexOf(heading);
    const down = heading.getAttribute("aria-sort") === "ascending";
    for (const other of row.children) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = (tr) => tr.children[column].dataset.value ?? tr.children[column].textContent;
    const compare = (a, b) => {
      const [x, y] = [value(a), value(b)];
      const apart = x === "" || y === "" || isNaN(x) || isNaN(y) ? String(x).localeCompare(y) : x - y;
      return down ? -apart : apart;
    };
    body.append(...[...body.rows].sort(compare));
  });
}
