use super::*;

fn tools() -> Tools {
    let tool = |name: &str| {
        json!({"type": "function", "function": {"name": name, "description": "d", "parameters": {
            "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]
        }}})
    };
    Tools { list: vec![tool("weather"), tool("time")], choice: Choice::Auto }
}

/// The whole answer at once, and byte by byte: the same text and calls.
fn read(answer: &str) -> (String, Vec<(String, String)>) {
    let sum = |deltas: Vec<Delta>| {
        let (mut said, mut calls) = (String::new(), Vec::new());
        for delta in deltas {
            match delta {
                Delta::Text(t) => said.push_str(&t),
                Delta::Begin(name) => calls.push((name, String::new())),
                Delta::Arguments(part) => calls.last_mut().expect("a call has begun").1.push_str(&part),
            }
        }
        (said, calls)
    };
    let mut reader = Reader::new(&tools());
    let mut all = reader.push(answer);
    all.extend(reader.finish());
    let whole = sum(all);
    assert_eq!(reader.calls(), whole.1.len());
    let mut reader = Reader::new(&tools());
    let mut all = Vec::new();
    for c in answer.chars() {
        all.extend(reader.push(&c.to_string()));
    }
    all.extend(reader.finish());
    assert_eq!(sum(all), whole, "in pieces: {answer}");
    whole
}

#[test]
fn every_style() {
    let paris = r#"{"city":"Paris"}"#;
    let rome = r#"{"city":"Rome"}"#;
    let one = [
        "<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Paris\"}}\n</tool_call>",
        "<tool_call>{\"arguments\": {\"city\": \"Paris\"}, \"name\": \"weather\"}</tool_call>",
        "<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Paris\"}}\n",
        "{\"name\": \"weather\", \"parameters\": {\"city\": \"Paris\"}}",
        " \n{\"type\": \"function\", \"name\": \"weather\", \"parameters\": {\"city\": \"Paris\"}}",
        "{\"type\": \"function\", \"function\": {\"name\": \"weather\", \"arguments\": {\"city\": \"Paris\"}}}",
        "[TOOL_CALLS][{\"name\": \"weather\", \"arguments\": {\"city\": \"Paris\"}}]",
        "[TOOL_CALLS] [{\"name\": \"weather\", \"arguments\": {\"city\": \"Paris\"}, \"id\": \"abc\"}]",
        "[{\"name\": \"weather\", \"arguments\": {\"city\": \"Paris\"}}]",
        "{\"tool_calls\": [{\"name\": \"weather\", \"arguments\": {\"city\": \"Paris\"}}]}",
    ];
    for answer in one {
        assert_eq!(read(answer), (String::new(), vec![("weather".into(), paris.into())]), "{answer}");
    }
    let two = [
        "<tool_call>{\"name\":\"weather\",\"arguments\":{\"city\":\"Paris\"}}</tool_call>\n<tool_call>{\"name\":\"time\",\"arguments\":{\"city\":\"Rome\"}}</tool_call>",
        "{\"name\":\"weather\",\"parameters\":{\"city\":\"Paris\"}}; {\"name\":\"time\",\"parameters\":{\"city\":\"Rome\"}}",
        "[TOOL_CALLS][{\"name\":\"weather\",\"arguments\":{\"city\":\"Paris\"}},{\"name\":\"time\",\"arguments\":{\"city\":\"Rome\"}}]",
    ];
    for answer in two {
        let calls = vec![("weather".into(), paris.into()), ("time".into(), rome.into())];
        assert_eq!(read(answer), (String::new(), calls), "{answer}");
    }
    let words = "Let me look.\n<tool_call>{\"name\":\"time\",\"arguments\":{}}</tool_call>";
    assert_eq!(read(words), ("Let me look.".into(), vec![("time".into(), "{}".into())]));
    let text_arguments = r#"{"name": "weather", "arguments": "{\"city\":\"Paris\"}"}"#;
    assert_eq!(read(text_arguments).1, [("weather".to_owned(), paris.to_owned())]);
    assert_eq!(read(r#"{"name": "time"}"#).1, [("time".to_owned(), "{}".to_owned())]);
}

#[test]
fn what_is_no_call_is_text_unchanged() {
    for answer in [
        "Hello there.\n",
        "",
        "a < b and <tool> and <tool_cal",
        "{\"answer\": 42}",
        "{\"name\": \"unknown\", \"arguments\": {}}",
        "{\"name\": \"weather\", \"arguments\": 7}",
        "{\"name\": \"weather\", \"argum",
        "[1, 2, 3]",
        "[see above] for more",
        "[TOOL_CALLS] nothing",
        "<tool_call>nothing</tool_call> more",
        "{}",
        "{ not json",
        "\u{1f98a} {\"name\": \"weather\"}",
    ] {
        assert_eq!(read(answer), (answer.to_owned(), vec![]), "{answer}");
    }
}

#[test]
fn arguments_are_told_as_they_are_written() {
    let pieces = |answer: &[&str]| {
        let mut reader = Reader::new(&tools());
        let mut told: Vec<_> = answer.iter().map(|piece| reader.push(piece)).collect();
        told.push(reader.finish());
        told
    };
    let begin = || Delta::Begin("weather".into());
    let part = |text: &str| vec![Delta::Arguments(text.into())];
    for (before, behind) in [
        ("<tool_call>\n{\"name\": \"weather\", \"arguments\": ", "}\n</tool_call>\n"),
        ("[TOOL_CALLS] [{\"name\": \"weather\", \"arguments\": ", ", \"id\": \"a{b\"}]"),
        ("{\"name\": \"weather\", \"parameters\": ", "}"),
        ("{\"tool_calls\": [{\"type\": \"function\", \"function\": {\"name\": \"weather\", \"arguments\": ", "}}]}"),
    ] {
        let told = pieces(&[before, "{", " \"city\": ", "\"a } \\\"b", "\" , \"x\": [1", ", {}]}", behind]);
        let want = [
            vec![],
            vec![begin(), part("{").remove(0)],
            part("\"city\":"),
            part("\"a } \\\"b"),
            part("\",\"x\":[1"),
            part(",{}]}"),
            vec![],
            vec![],
        ];
        assert_eq!(told, want, "{before}");
    }
    // An answer that is cut in its arguments is a call that is cut.
    let cut = "{\"name\": \"weather\", \"arguments\": {\"city\": \"Pa";
    assert_eq!(read(cut), (String::new(), vec![("weather".into(), "{\"city\":\"Pa".into())]));
    let words = "{\"name\": \"time\", \"arguments\": {}} That is all.";
    assert_eq!(read(words), ("That is all.".into(), vec![("time".into(), "{}".into())]));
    assert_eq!(read("{\"name\": \"nothing\", \"arguments\": {}} x").1, []);
}

#[test]
fn text_is_told_as_it_comes() {
    let mut reader = Reader::new(&tools());
    assert_eq!(reader.push("Hi"), [Delta::Text("Hi".into())]);
    assert_eq!(reader.push(" a"), [Delta::Text(" a".into())]);
    assert_eq!(reader.push("\n<tool"), []);
    assert_eq!(reader.push("s>"), [Delta::Text("\n<tools>".into())]);
    let mut reader = Reader::new(&tools());
    assert_eq!(reader.push("{\"ans"), [Delta::Text("{\"ans".into())], "an object of another kind is not held back");
    let mut reader = Reader::new(&tools());
    assert_eq!(reader.push("<tool_call>"), []);
    assert_eq!(reader.push(&"x".repeat(LONGEST + 1)).len(), 1, "a call without an end is not held for ever");
}

#[test]
fn fields_and_their_errors() {
    let list = Value::Array(tools().list);
    let read = |choice: Value| Tools::read(Some(&list), Some(&choice));
    assert_eq!(read(json!("none")), Ok(None));
    assert_eq!(Tools::read(None, None), Ok(None));
    assert_eq!(Tools::read(Some(&json!([])), Some(&json!("auto"))), Ok(None));
    let choice = |v: Value| read(v).expect("good").map(|t| t.choice);
    assert_eq!(choice(json!("auto")), Some(Choice::Auto));
    assert_eq!(choice(json!("required")), Some(Choice::Required));
    let named = json!({"type": "function", "function": {"name": "time"}});
    assert_eq!(choice(named), Some(Choice::Function("time".into())));
    for bad in [json!("maybe"), json!(7), json!({}), json!({"function": {"name": "gone"}})] {
        assert_eq!(read(bad.clone()).map_err(|e| e.0), Err("tool_choice"), "{bad}");
    }
    assert_eq!(Tools::read(None, Some(&json!("required"))).map_err(|e| e.0), Err("tool_choice"));
    for bad in [
        json!({}),
        json!([1]),
        json!([{"type": "code"}]),
        json!([{"type": "function"}]),
        json!([{"type": "function", "function": {"name": ""}}]),
        json!([{"type": "function", "function": {"name": "a", "parameters": 3}}]),
    ] {
        assert_eq!(Tools::read(Some(&bad), None).map_err(|e| e.0), Err("tools"), "{bad}");
    }
}

#[test]
fn a_forced_call_has_the_form_of_its_schema() {
    assert_eq!(tools().form(), None);
    let one = Tools { choice: Choice::Function("time".into()), ..tools() };
    let Some(Form::Schema { schema, .. }) = one.form() else { panic!("no form") };
    assert_eq!(schema["properties"]["name"]["const"], "time");
    assert_eq!(schema["properties"]["arguments"]["required"], json!(["city"]));
    let any = Tools { choice: Choice::Required, ..tools() };
    let Some(Form::Schema { schema, .. }) = any.form() else { panic!("no form") };
    assert_eq!(schema["anyOf"].as_array().map(Vec::len), Some(2));
}

#[test]
fn messages_for_both_kinds_of_templates() {
    let messages = json!([
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": null, "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{\"city\": \"Paris\"}"}}]},
        {"role": "tool", "tool_call_id": "1", "name": "weather", "content": "sunny"}
    ]);
    let native = for_template(&messages);
    assert_eq!(native[2]["tool_calls"][0]["function"]["arguments"], json!({"city": "Paris"}));
    assert_eq!(native[2]["content"], "");
    assert_eq!(native[1], messages[1], "nothing else changes");
    let told = tools().told(&messages);
    let text = |i: usize| told[i]["content"].as_str().unwrap_or("").to_owned();
    assert!(text(0).starts_with("Be brief.") && text(0).contains("\"name\":\"weather\""), "{}", text(0));
    assert_eq!(text(2), r#"{"name":"weather","arguments":{"city":"Paris"}}"#);
    assert_eq!((told[3]["role"].as_str(), text(3).as_str()), (Some("user"), "The result of weather: sunny"));
    let without = tools().told(&json!([{"role": "user", "content": "Hi"}]));
    assert_eq!(without[0]["role"], "system");
    assert_eq!(without.as_array().map(Vec::len), Some(2));
    assert!(template_knows("{% if tools %}") && !template_knows("{{ messages }}"));
}
