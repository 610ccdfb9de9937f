package androidx.compose.foundation

import androidx.compose.ui.Modifier
import androidx.compose.ui.graphics.ImageBitmap

fun Image(bitmap: ImageBitmap, contentDescription: String?, modifier: Modifier = Modifier) {}
