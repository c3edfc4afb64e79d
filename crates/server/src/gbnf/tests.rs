use super::*;

#[test]
fn grammars_without_recursion_are_one_expression() {
    let cases = [
        ("root ::= \"yes\" | \"no\"", "start: /(?:yes)|(?:no)/\n"),
        (
            "root ::= item-a{2,3}\n\n# c\nitem-a ::= [a-z/]+ .?",
            "start: /(?:(?:(?:[a-z\\x{2f}])+)(?:(?:[\\x{0}-\\x{10ffff}])?)){2,3}/\n",
        ),
        (
            "root ::= (\n  \"\\x41\\u00e9\" |\n  Bee\n)*\nBee ::= [^\"\\]]",
            "start: /(?:(?:A\\x{e9})|(?:[^\\x{22}\\x{5d}]))*/\n",
        ),
        ("root ::= a {2,} \"\" b{3}\na ::= |\"x\"\nb::=\"y\" [-a]", ""),
    ];
    for (gbnf, lark) in cases {
        let made = to_lark(gbnf).unwrap();
        assert!(made.starts_with("start: /") && made.lines().count() == 1, "{made}");
        assert!(lark.is_empty() || made == lark, "{made}");
    }
}

/// The subset of llama.cpp's grammar of JSON that shows what it is made of.
const JSON: &str = r#"
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws
object ::= "{" ws ( string ":" ws value ("," ws string ":" ws value)* )? "}" ws
array  ::= "[" ws ( value ("," ws value)* )? "]" ws
string ::= "\"" ( [^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}) )* "\"" ws
number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9] [1-9]{0,15})? ws
ws     ::= | " " | "\n" [ \t]{0,20}
"#;

#[test]
fn pieces_that_no_longer_match_begins_with_are_terminals() {
    let lark = to_lark(JSON).unwrap();
    // Strings end with their quotes; numbers may go on, so they are matched character by character.
    assert!(lark.contains(r"/(?:\x{22})(?:(?:(?:[^"), "{lark}");
    assert!(lark.contains("/(?:true)|(?:false)|(?:null)/"), "{lark}");
    assert!(lark.contains("( /[0-9]/ )+"), "{lark}");
    // Here a name may begin with the word, so the word is none.
    let names = to_lark("root ::= \"let\" root | [a-z] root | \";\"").unwrap();
    assert!(!names.contains("let") && names.contains("/[a-z]/ start"), "{names}");
}

#[test]
fn terminals_clash_where_one_begins_the_other() {
    let none: [usize; 0] = [];
    let clashing = |all: &[&str]| {
        let mut found: Vec<usize> = terminals::clashes(all).unwrap().into_iter().collect();
        found.sort_unstable();
        found
    };
    assert_eq!(clashing(&["a", "b", "[a-c]"]), none);
    assert_eq!(clashing(&["x", "xy", "z"]), [1]);
    assert_eq!(clashing(&["[a-z]+"]), [0]);
    assert_eq!(clashing(&["[a-z]+;", "é", "[^a-z]"]), none);
    assert_eq!(clashing(&["abc", "[a-z]+;"]), [1]);
    assert_eq!(clashing(&["(?:ab)*c", "abb"]), none, "what only begins alike does not clash");
    assert!(terminals::clashes(&["[a-z]{1,30000}"]).is_none(), "bounded work");
}

#[test]
fn what_is_wrong_is_an_error_with_its_line() {
    for (text, wanted) in [
        ("root ::= \"a", "line 1: a string is not closed"),
        ("root ::= a\na ::= [b", "line 2: a set is not closed"),
        ("root ::= é", "line 1"),
        ("root ::= \"\\", "line 1: the escape"),
        ("root ::= \"\\xg0\"", "line 1: the escape `\\x`"),
        ("root ::= \"\\ud800\"", "line 1: the escape"),
        ("root ::= \"a\"\n\nb ::= c", "line 3: there is no rule \"c\""),
        ("a ::= \"b\"", "no rule \"root\""),
        ("root ::= \"a\"\nroot ::= \"b\"", "line 2: a second rule"),
        ("root ::= [z-a]", "line 1: the range"),
        ("root ::= []", "line 1: a set without"),
        ("root ::= \"a\"{3,2}", "line 1: {3,2}"),
        ("root ::= \"a\"{99999999999}", "line 1: {99999999999}"),
        ("root ::= (\"a\"", "line 1: a bracket"),
        ("root ::= \"a\")", "line 1"),
        ("root ::= <[10]>", "tokens by name"),
        ("root = \"a\" ::= b", "line 1: `::=` must follow"),
        (&format!("root ::= \"a\"{}", "*".repeat(9000)), "more than 8 repetitions"),
    ] {
        let e = to_lark(text).expect_err(text);
        assert!(e.contains(wanted), "{text}: {e}");
    }
}

#[test]
fn large_grammars_are_written_in_bounded_time() {
    let start = std::time::Instant::now();
    let chain: String = (0..6000).map(|i| format!("r{i} ::= r{} r{}\n", i + 1, i + 1)).collect();
    let long = format!("root ::= {} root?\na ::= \"{}\" [a-z]", "a ".repeat(60_000), "x".repeat(4000));
    let words: String = (0..8000).map(|i| format!("\"word{i}\" root | ")).collect();
    // Automata that double with every character: 17 s before they counted more.
    let doubling: String = (0..300).map(|i| format!("\"{i}\" .* \"a\" .{{{}}} \"b{i}\" root | ", 8 + i % 5)).collect();
    for text in [
        format!("root ::= {doubling} \"end\""),
        format!("root ::= r0\n{chain}r6000 ::= \"x\""),
        format!("root ::= r0 root?\n{chain}r6000 ::= \"x\""),
        long,
        format!("root ::= {words} \"end\""),
        format!("root ::= ({} root)?", "[a-z]{1,900} ".repeat(900)),
    ] {
        assert!(to_lark(&text).unwrap().starts_with("start:"));
    }
    assert!(start.elapsed().as_secs() < 60, "{:?}", start.elapsed());
}
