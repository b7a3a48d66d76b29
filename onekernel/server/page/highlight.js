// Colours for code that are right often enough, in any language: comments, strings, numbers and common keywords.
// It makes DOM nodes of plain text; model text is never parsed as HTML.

const KEYWORDS = new Set((
  "abstract and as assert async await begin bool boolean break case catch char class const constexpr continue def " +
  "default defer del delete do double elif else elsif end enum esac except export extends extern false fi final " +
  "finally float fn for from func function global go goto if impl implements import in include int interface is " +
  "lambda let local long loop match mod module mut namespace new nil None nonlocal not null nullptr or override " +
  "package pass private protected pub public raise readonly ref return select self set short signed sizeof static " +
  "struct super switch template then this throw throws trait true True False try type typedef typename typeof " +
  "undefined union unless unsigned until use using var virtual void volatile when where while with yield " +
  "SELECT FROM WHERE JOIN ON GROUP BY ORDER INSERT INTO VALUES UPDATE DELETE CREATE TABLE AND OR NOT NULL"
).split(" "));

const HASH_COMMENTS = new Set(["", "python", "py", "sh", "bash", "shell", "zsh", "ruby", "rb", "yaml", "yml", "toml", "r", "perl", "make", "dockerfile"]);
const PLAIN = new Set(["text", "txt", "plain", "plaintext", "diff", "markdown", "md", "output", "console"]);

const STRING = `"""[^]*?(?:"""|$)|'''[^]*?(?:'''|$)|"(?:\\\\.|[^"\\\\\\n])*"?|'(?:\\\\.|[^'\\\\\\n])*'?|\`(?:\\\\.|[^\`\\\\])*\`?`;
const NUMBER = "\\b(?:0[xX][\\da-fA-F_]+|\\d[\\d_]*(?:\\.\\d+)?(?:[eE][+-]?\\d+)?)\\b";

function pattern(language) {
  const slashes = "//[^\\n]*|/\\*[^]*?(?:\\*/|$)";
  const comment = HASH_COMMENTS.has(language) ? "#[^\\n]*" : language === "sql" || language === "lua" ? "--[^\\n]*" : slashes;
  return new RegExp(`(?<c>${comment})|(?<s>${STRING})|(?<n>${NUMBER})|(?<w>[A-Za-z_]\\w*)`, "g");
}

/** The nodes of `code`: text and <span class="c|s|n|k">. */
export function highlight(code, language) {
  const nodes = [];
  if (PLAIN.has(language) || code.length > 100_000) return [document.createTextNode(code)];
  let plain = "";
  const flush = () => { if (plain) nodes.push(document.createTextNode(plain)); plain = ""; };
  let at = 0;
  for (const match of code.matchAll(pattern(language))) {
    const { c, s, n, w } = match.groups;
    const kind = c !== undefined ? "c" : s !== undefined ? "s" : n !== undefined ? "n" : KEYWORDS.has(w) ? "k" : "";
    plain += code.slice(at, match.index);
    at = match.index + match[0].length;
    if (!kind) { plain += match[0]; continue; }
    flush();
    const span = document.createElement("span");
    span.className = kind;
    span.textContent = match[0];
    nodes.push(span);
  }
  plain += code.slice(at);
  flush();
  return nodes;
}
