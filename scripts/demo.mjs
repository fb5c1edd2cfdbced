#!/usr/bin/env node
// `npm run demo`: sets everything up, then runs the README's example and says what it did and how long it took.

import { execFileSync } from 'node:child_process'
import { join } from 'node:path'
import { main, root } from './progress.mjs'
import { setup } from './setup.mjs'

await main(async () => {
  process.chdir(root)
  await setup()
  // A process of its own: the library is loaded as a program would load it.
  execFileSync(process.execPath, [join(root, 'examples', 'demo.mjs')], { stdio: 'inherit' })
})
