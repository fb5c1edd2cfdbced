//! Paths as users write them: `~` and relative ones lie under the user's home.

use amber_proto::ErrorCode;

use crate::conn::{Result, failure};
use crate::users::User;

/// The absolute path that is meant. An empty one is the default directory.
pub(crate) fn resolve(path: &str, user: &User, default: Option<&str>) -> Result<String> {
    let path = if path.is_empty() { default.unwrap_or("~") } else { path };
    if path.contains('\0') {
        return Err(failure(ErrorCode::InvalidArgument, "path contains a NUL byte"));
    }
    let under_home = match path.strip_prefix('~') {
        Some("") => "",
        Some(rest) => rest.strip_prefix('/').ok_or_else(|| {
            failure(
                ErrorCode::InvalidArgument,
                format!("path '{path}': only the own home directory can be abbreviated"),
            )
        })?,
        None if path.starts_with('/') => return Ok(path.to_owned()),
        None => path,
    };
    Ok(clean(&format!("/{}/{}", user.home, under_home)))
}

/// An absolute path without `.`, `..` and empty components. `..` is taken lexically, as users mean it for paths under their home.
fn clean(path: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    format!("/{}", parts.join("/"))
}

/// The last component of a path, as listings name it.
pub(crate) fn base(path: &str) -> &str {
    path.trim_end_matches('/').rsplit('/').next().filter(|name| !name.is_empty()).unwrap_or("/")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resolves() {
        let user = User { name: "u".into(), uid: 1, gid: 1, home: "/home/u".into() };
        let resolved = |path| resolve(path, &user, None).unwrap();
        assert_eq!(resolved(""), "/home/u");
        assert_eq!(resolved("~"), "/home/u");
        assert_eq!(resolved("~/a//b/"), "/home/u/a/b");
        assert_eq!(resolved("a/../b/./c"), "/home/u/b/c");
        assert_eq!(resolved("../../../../x"), "/x");
        assert_eq!(resolved("/a/../b/"), "/a/../b/");
        assert_eq!(resolve("", &user, Some("/work")).unwrap(), "/work");
        assert_eq!(resolve("", &user, Some("sub")).unwrap(), "/home/u/sub");
        assert!(resolve("~root/x", &user, None).is_err());
        assert!(resolve("a\0b", &user, None).is_err());
        assert_eq!((base("/a/b"), base("/a/b/"), base("/")), ("b", "b", "/"));
    }
}
